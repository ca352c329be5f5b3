"""The variants of Fig. 8 and the building blocks of Fig. 10 as overrides, see docs/spop.md."""

WITHOUT_REFINEMENT = ["MODEL.SPOP.REFINEMENT.ENABLED", False]
SINGLE_SCALE = ["MODEL.SPOP.SCALES", (1.0,)]
ENLARGED_SCALE = ["MODEL.SPOP.SCALES", (2.0,)]

VARIANTS = {
    "S-scale": ["MODEL.SPOP.SCALE_AWARE", False, *SINGLE_SCALE, *WITHOUT_REFINEMENT],
    "S-scale+SA": [*SINGLE_SCALE, *WITHOUT_REFINEMENT],
    "M-scale+SA": WITHOUT_REFINEMENT,
    "M-scale+SA+RF": [],
}
BUILDING_BLOCKS = {
    f"{name}, {scale_name}": ["MODEL.SPOP.LOCALIZATION", name, *scale, *WITHOUT_REFINEMENT]
    for name in ("large_size", "small_size")
    for scale_name, scale in (("original", SINGLE_SCALE), ("enlarged", ENLARGED_SCALE))
}
