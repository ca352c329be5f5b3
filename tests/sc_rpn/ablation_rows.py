"""The rows of Tables III-VIII as overrides of configs/sc_rpn_only.yaml, see docs/sc_rpn.md."""


def node(text: str) -> list[str]:
    """``"KEY value; KEY value"`` below MODEL.SCRPN -> a list of overrides."""
    overrides = []
    for pair in filter(None, (p.strip() for p in text.split(";"))):
        key, value = pair.split(" ", 1)
        overrides += [f"MODEL.SCRPN.{key}", value]
    return overrides


BOX = "REPRESENTATION box; "
SMOOTH_L1 = (
    "BBOX_REG_LOSS_TYPE ('smooth_l1','smooth_l1'); CLS_LOSS_WEIGHT 1.0; INIT_LOSS_WEIGHT 1.0; "
    "REFINED_LOSS_WEIGHT 1.0; INIT_NORMALIZER samples; REFINED_NORMALIZER samples; "
)
WITHOUT_SADS = "INIT_ASSIGNER max_iou; REFINED_ASSIGNER max_iou; "
WITHOUT_MASK = "IOU_MASK.ENABLED False; "

ROWS = {
    "III baseline": BOX
    + SMOOTH_L1
    + WITHOUT_SADS
    + WITHOUT_MASK
    + "NUM_STAGES 1; ALIGNMENT none; ANCHOR_ASPECT_RATIOS (0.5,1.0,2.0)",
    "III one anchor": BOX
    + SMOOTH_L1
    + WITHOUT_SADS
    + WITHOUT_MASK
    + "NUM_STAGES 1; ALIGNMENT none",
    "III two stages": BOX + SMOOTH_L1 + WITHOUT_SADS + WITHOUT_MASK + "ALIGNMENT none",
    "III alignment": BOX + SMOOTH_L1 + WITHOUT_SADS + WITHOUT_MASK + "ALIGNMENT box",
    "III IoU loss": BOX + WITHOUT_SADS + WITHOUT_MASK + "ALIGNMENT box",
    "III points": WITHOUT_SADS + WITHOUT_MASK,
    "III SADS": WITHOUT_MASK,
    "III IoU mask": "",
    "IV Max-IoU, Max-IoU": WITHOUT_SADS + WITHOUT_MASK,
    "IV Max-IoU, SAT": "INIT_ASSIGNER max_iou; " + WITHOUT_MASK,
    "IV PosR, SAT": WITHOUT_MASK,
    **{f"V sigma {x}": WITHOUT_MASK + f"SIGMA {x}" for x in (0.1, 0.2, 0.3, 0.4, 0.5)},
    **{f"V k {x}": WITHOUT_MASK + f"TOPK {x}" for x in (3, 6, 9, 12, 15, 18)},
    **{f"V N {x}": WITHOUT_MASK + f"NUM_LEVELS {x}" for x in (1, 2, 3, 4, 5)},
    **{
        f"{table} {sads or 'SADS'}, {value}, test {at_test}": f"{sads}{key} {value}; "
        f"IOU_MASK.USE_AT_TEST {at_test}"
        for sads in (WITHOUT_SADS, "")
        for table, key, values in (
            (
                "VI",
                "IOU_MASK.SAMPLES",
                ("regression", "regression_and_negatives", "classification"),
            ),
            ("VII", "IOU_MASK.FEATURE", ("fused", "cls", "reg")),
        )
        for value in values
        for at_test in (False, True)
    },
    "VIII anchors": BOX + WITHOUT_SADS + WITHOUT_MASK + "ALIGNMENT box",
    "VIII point description": WITHOUT_SADS + WITHOUT_MASK + "ALIGNMENT box",
    "VIII point alignment": WITHOUT_SADS + WITHOUT_MASK,
}
