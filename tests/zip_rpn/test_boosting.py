"""Boosted scores of ZIP's detector: PyTorch's ensemble is scikit-learn's, and what feeds it."""

import sys

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.events import EventStorage
from PIL import Image
from torch import nn

from d2proposals.proposals.native_size import NativeSizes
from d2proposals.zip_rpn.boosting import (
    BoostedTrees,
    check_scikit_learn,
    fit_boosted_trees,
    load_boosted_trees,
    save_boosted_trees,
)
from d2proposals.zip_rpn.boosting_samples import collect_block_features
from d2proposals.zip_rpn.roi_heads import BoostedOutputLayers
from tests.common import make_cfg, make_instances
from tools import boost_detector
from tools.boost_detector import main

sklearn_ensemble = pytest.importorskip("sklearn.ensemble")
sklearn_tree = pytest.importorskip("sklearn.tree")

SMALL = ["MODEL.BN_INCEPTION.WIDTH_FACTOR", 0.125, "MODEL.ZIP.HEAD_CHANNELS", 16,
         "MODEL.BN_INCEPTION.NORM", "GN", "MODEL.ZOOM_NETWORK.NORM", "GN",
         "MODEL.ZIP_DETECTOR.CHANNELS", 16, "MODEL.ZIP_DETECTOR.NORM", "GN"]  # fmt: skip
NUM_FEATURES = 6 * 16 + 3 * 32  # of the nine blocks


def make_samples(num_classes, num_features=6, number=400, seed=0):
    """Classes that overlap, so that no tree is perfect; background is the last."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, num_classes + 1, number)
    centers = random.normal(size=(num_classes + 1, num_features))
    return (centers[labels] + random.normal(size=(number, num_features))).astype("f4"), labels


def make_trees(arrays) -> BoostedTrees:
    sizes = {name: int(arrays[name]) for name in ("num_features", "num_classes")}
    return BoostedTrees(**{**arrays, **sizes})


@pytest.mark.parametrize("num_classes, max_depth", [(1, 1), (1, 3), (4, 1), (4, 4), (20, 3)])
def test_votes_are_scikit_learns_decision_function(num_classes, max_depth):
    features, labels = make_samples(num_classes)
    arrays = fit_boosted_trees(
        features, labels, num_classes, num_estimators=30, max_depth=max_depth, seed=3
    )
    ensemble = sklearn_ensemble.AdaBoostClassifier(
        sklearn_tree.DecisionTreeClassifier(max_depth=max_depth), n_estimators=30, random_state=3
    ).fit(features, labels)
    # Thresholds lie between training samples; other samples, and the training's, come out alike.
    others, _ = make_samples(num_classes, seed=5)
    for x in (features, others):
        share = make_trees(arrays)(torch.from_numpy(x)).double().numpy()
        assert share.shape == (len(x), num_classes + 1)
        number = num_classes + 1
        decision = (number * share - 1) / (number - 1)
        if number == 2:
            decision = decision[:, 1] - decision[:, 0]
        np.testing.assert_allclose(decision, ensemble.decision_function(x), atol=1e-6)
        # The class and, by the softmax of the decisions, the probabilities are the same too.
        assert (share.argmax(1) == ensemble.predict(x)).mean() > 0.99
        scaled = np.stack([-decision, decision], 1) / 2 if number == 2 else decision / num_classes
        expected = np.exp(scaled) / np.exp(scaled).sum(1, keepdims=True)
        np.testing.assert_allclose(ensemble.predict_proba(x), expected, atol=1e-6)
        assert np.allclose(share.sum(1), 1) and share.min() >= 0


def test_classes_without_samples_get_no_vote():
    features, labels = make_samples(5)
    kept = (labels != 2) & (labels != 4)
    arrays = fit_boosted_trees(features[kept], labels[kept], 5, num_estimators=10, max_depth=2)
    share = make_trees(arrays)(torch.from_numpy(features))
    assert share.shape == (400, 6)
    assert (share[:, [2, 4]] == 0).all() and (share[:, [0, 1, 3, 5]].amax(0) > 0).all()


def test_a_perfect_tree_ends_the_fit():
    features = np.array([[0.0], [1.0], [2.0], [3.0]], dtype=np.float32)
    arrays = fit_boosted_trees(features, np.array([0, 0, 1, 1]), 1, num_estimators=10, max_depth=1)
    assert len(arrays["weights"]) == 1
    assert make_trees(arrays)(torch.tensor([[1.4], [1.5], [1.6]])).tolist() == [
        [1, 0], [1, 0], [0, 1],
    ]  # fmt: skip


def two_stumps(**changes):
    """Feature 0 at most .5: class 0, else 1, with weight 1; feature 1 at most 2: 1, else 2 (3)."""
    arrays = {
        "feature": np.array([[0, 0, 0], [1, 0, 0]]),
        "threshold": np.array([[0.5, 0, 0], [2.0, 0, 0]], dtype=np.float32),
        "left": np.array([[1, 1, 2], [1, 1, 2]]),
        "right": np.array([[2, 1, 2], [2, 1, 2]]),
        "leaf_class": np.array([[0, 0, 1], [0, 1, 2]]),
        "weights": np.array([1.0, 3.0]),
        "num_features": np.array(2),
        "num_classes": np.array(2),
    }
    return {**arrays, **changes}


def test_votes_by_hand():
    trees = make_trees(two_stumps())
    x = torch.tensor([[0.5, 2.0], [0.6, 2.0], [0.5, 2.1], [0.6, 2.1]])
    expected = [[0.25, 0.75, 0], [0, 1, 0], [0.25, 0, 0.75], [0, 0.25, 0.75]]
    assert torch.allclose(trees(x), torch.tensor(expected))
    assert trees(torch.zeros(0, 2)).shape == (0, 3)
    assert trees.depth == 1 and trees.state_dict() == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": np.array([1.0])},
        {"weights": np.array([1.0, -1.0])},
        {"weights": np.array([1.0, np.nan])},
        {"feature": np.array([[0, 0, 0], [2, 0, 0]])},
        {"leaf_class": np.array([[0, 0, 1], [0, 1, 3]])},
        {"left": np.array([[1, 0, 2], [1, 1, 2]])},  # a circle
        {"right": np.array([[3, 1, 2], [2, 1, 2]])},
        {"threshold": np.zeros((2, 2), dtype=np.float32)},
    ],
)
def test_arrays_that_contradict_each_other(tmp_path, changes):
    path = tmp_path / "boosting.npz"
    save_boosted_trees(path, two_stumps(**changes))
    with pytest.raises(ValueError, match="cannot be read .*contradict each other") as error:
        load_boosted_trees(path)
    assert "\n" not in str(error.value)


def test_file_round_trip(tmp_path):
    features, labels = make_samples(3)
    arrays = fit_boosted_trees(features, labels, 3, num_estimators=8, max_depth=3)
    save_boosted_trees(tmp_path / "boosting.npz", arrays)
    assert [path.name for path in tmp_path.iterdir()] == ["boosting.npz"]
    loaded = load_boosted_trees(tmp_path / "boosting.npz")
    x = torch.from_numpy(features)
    assert torch.equal(loaded(x), make_trees(arrays)(x))
    assert (loaded.num_features, loaded.num_classes) == (6, 3)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_cut_off_file(tmp_path, share):
    path = tmp_path / "boosting.npz"
    save_boosted_trees(path, two_stumps())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match="cannot be read .*make it again") as error:
        load_boosted_trees(path)
    assert "\n" not in str(error.value)


class Hostile:
    def __reduce__(self):
        return print, ("ran",)


def test_other_files_are_refused_and_their_code_is_not_run(tmp_path, capsys):
    path = tmp_path / "boosting.npz"
    np.savez(path, **two_stumps(feature=np.array([[Hostile()] * 3] * 2, dtype=object)))
    with pytest.raises(ValueError, match="cannot be read"):
        load_boosted_trees(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(ValueError, match="cannot be read"):
        load_boosted_trees(path)
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match="cannot be read"):
        load_boosted_trees(path)
    assert "ran" not in capsys.readouterr().out


def test_missing_file_and_library(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="tools/boost_detector.py makes it"):
        load_boosted_trees(tmp_path / "none.npz")
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(ValueError, match="needs scikit-learn: pip install 'scikit-learn>=1.6'"):
        fit_boosted_trees(*make_samples(2), 2)


@pytest.mark.parametrize("version", ["1.5.2", "1.6.0", "1.10.0", "2.0.dev0"])
def test_an_older_scikit_learn_is_named(monkeypatch, version):
    """Before 1.6 AdaBoost is SAMME.R unless told otherwise."""
    monkeypatch.setattr(sys.modules["sklearn"], "__version__", version)
    if version == "1.5.2":
        with pytest.raises(ValueError, match="1.6 or newer.* this is 1.5.2: pip install"):
            check_scikit_learn()
    else:
        check_scikit_learn()


def test_one_class_is_not_enough():
    with pytest.raises(ValueError, match="two classes at least; these 4 have the labels \\[7\\]"):
        fit_boosted_trees(np.zeros((4, 2), dtype=np.float32), np.full(4, 7), 9)


def build_detector(*overrides):
    torch.manual_seed(0)
    return build_model(make_cfg("zip_detector.yaml", *SMALL, *overrides))


def make_input(size=(96, 128), boxes=((8, 8, 40, 72), (60, 10, 120, 90)), seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, *size), generator=generator).float()
    return {"image": image, "instances": make_instances(size, boxes)}


def boosting_file(path, num_classes=20, num_features=NUM_FEATURES):
    features, labels = make_samples(num_classes, num_features, number=600)
    arrays = fit_boosted_trees(features, labels, num_classes, num_estimators=5, max_depth=3)
    save_boosted_trees(path, arrays)
    return str(path)


def test_scores_are_the_trees_in_evaluation_and_the_network_s_in_training(tmp_path):
    path = boosting_file(tmp_path / "boosting.npz")
    boosted, plain = build_detector("MODEL.ZIP_DETECTOR.BOOSTING_FILE", path), build_detector()
    # The same checkpoint fits both.
    boosted.load_state_dict(plain.state_dict())
    heads = boosted.roi_heads.eval()
    nn.init.normal_(heads.box_predictor.bbox_pred.weight, std=0.1)
    x = torch.rand(7, 16, 7, 7)
    proposals = [Instances((96, 128)) for _ in range(2)]
    for proposals_i, number in zip(proposals, (3, 4), strict=True):
        proposals_i.proposal_boxes = Boxes(torch.tensor([[5.0, 5, 60, 70]] * number))
    with torch.no_grad():
        features = heads.box_head.block_features(x)
        predictions = heads.box_predictor(heads.box_head(x))
        probabilities = heads.box_predictor.predict_probs(predictions, proposals)
    assert [len(p) for p in probabilities] == [3, 4]
    expected = load_boosted_trees(path)(features)
    assert torch.equal(torch.cat(probabilities), expected)
    torch.testing.assert_close(predictions[1], heads.box_predictor.bbox_pred(features[:, -32:]))
    # Trees that all say the same make one class of every RoI; its share is the score.
    detections, _ = heads.box_predictor.inference(predictions, proposals)
    for detections_i, probabilities_i in zip(detections, probabilities, strict=True):
        scores = {round(float(p), 4) for p in probabilities_i[:, :-1].flatten() if p > 0}
        assert len(detections_i) > 0
        assert {round(float(s), 4) for s in detections_i.scores} <= scores
    heads.train()
    plain.roi_heads.train()
    logits, _ = heads.box_predictor(heads.box_head(x))
    expected, _ = plain.roi_heads.box_predictor(plain.roi_heads.box_head(x))
    assert torch.equal(logits, expected)
    result = heads.box_predictor.predict_probs((logits, None), proposals)
    assert torch.allclose(torch.cat(result), logits.softmax(dim=1))


def test_shares_of_eighty_classes_are_not_cut_as_probabilities_are(tmp_path):
    # Ten trees vote for each class and one more for class 7: it wins with 11 of 801 votes.
    trees = np.r_[np.tile(np.arange(80), 10), 7]
    leaf = np.stack([trees, trees, trees], axis=1)
    nodes = np.broadcast_to(np.arange(3), leaf.shape)
    save_boosted_trees(
        tmp_path / "boosting.npz",
        {"feature": np.zeros_like(leaf), "threshold": np.zeros(leaf.shape, dtype=np.float32),
         "left": nodes, "right": nodes, "leaf_class": leaf, "weights": np.ones(len(leaf)),
         "num_features": np.array(NUM_FEATURES), "num_classes": np.array(80)},
    )  # fmt: skip
    model = build_detector(
        "MODEL.ZIP_DETECTOR.BOOSTING_FILE", str(tmp_path / "boosting.npz"),
        "MODEL.ROI_HEADS.NUM_CLASSES", 80, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.05,
    )  # fmt: skip
    predictor = model.roi_heads.eval().box_predictor
    proposals = Instances((96, 128))
    proposals.proposal_boxes = Boxes(torch.tensor([[5.0, 5, 60, 70], [70.0, 10, 120, 90]]))
    with torch.no_grad():
        predictions = predictor(torch.rand(2, NUM_FEATURES))
        (detections,), _ = predictor.inference(predictions, [proposals])
    best = detections.pred_classes == 7
    assert best.sum() == 2 and len(detections) == 100  # TEST.DETECTIONS_PER_IMAGE of 160
    torch.testing.assert_close(detections.scores[best], torch.full((2,), 11 / 801))
    assert best[:2].all()
    # A class without votes is no detection.
    assert detections.scores.min() > 0


@pytest.mark.parametrize("number_of_sources", [2, 4])  # Table 6: B and EB
def test_boosted_rows_of_table_6_train_a_step_and_detect(tmp_path, number_of_sources):
    path = boosting_file(tmp_path / "boosting.npz")
    model = build_detector(
        "MODEL.ZIP_DETECTOR.BOOSTING_FILE", path,
        "MODEL.ZOOM_NETWORK.MAD.LAMBDA", number_of_sources,
    ).train()  # fmt: skip
    assert isinstance(model.roi_heads.box_predictor, BoostedOutputLayers)
    with EventStorage():
        losses = model([make_input()])
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    with torch.no_grad():
        first, second = (model.eval()([make_input()])[0]["instances"] for _ in range(2))
    assert torch.equal(first.scores, second.scores) and len(first) > 0


@pytest.mark.parametrize(
    "num_classes, num_features, message",
    [
        (20, 100, "made for 100 features and 20 classes; this detector has 192 features"),
        (7, NUM_FEATURES, "192 features and 7 classes; this detector .* and 20 classes"),
    ],
)
def test_file_of_another_detector(tmp_path, num_classes, num_features, message):
    path = boosting_file(tmp_path / "boosting.npz", num_classes, num_features)
    with pytest.raises(ValueError, match=message) as error:
        build_detector("MODEL.ZIP_DETECTOR.BOOSTING_FILE", path)
    assert "\n" not in str(error.value)


def test_samples_are_the_rois_of_the_heads_with_their_labels():
    model = build_detector().eval()
    inputs = [make_input(seed=i) for i in range(4)]
    looked_at = []

    def batches():
        for i, x in enumerate(inputs):
            looked_at.append(i)
            yield [x]

    seen = []
    original = model.roi_heads.label_and_sample_proposals

    def record(proposals, targets):
        seen.extend(original(proposals, targets))
        return seen[-1:]

    model.roi_heads.label_and_sample_proposals = record
    features, labels = collect_block_features(model, batches(), rois_per_image=12, max_rois=30)
    assert features.shape == (30, NUM_FEATURES) and features.dtype == np.float32
    assert labels.shape == (30,) and set(labels.tolist()) <= {0, 20}
    assert looked_at == [0, 1, 2]  # no image more than needed
    assert [len(p) for p in seen] == [12, 12, 12]
    assert (labels == torch.cat([p.gt_classes for p in seen]).numpy()[:30]).all()
    assert (labels == 0).any()  # the objects are among the samples
    assert model.roi_heads.batch_size_per_image == 128  # as before
    # The features are those that the detector sees in an evaluation.
    with torch.no_grad():
        images = model.preprocess_image([inputs[0]])
        maps = model.backbone(images.tensor)
        pooled = model.roi_heads.box_pooler(
            list(model.roi_heads.pooled_maps(maps, images.image_sizes).values()),
            [seen[0].proposal_boxes],
        )
        expected = model.roi_heads.box_head.block_features(pooled)
    np.testing.assert_allclose(features[:12], expected.numpy(), rtol=1e-4, atol=1e-4)


def test_generators_that_propose_more_than_boxes():
    """Detectron2's heads take no masks or classes of proposals with the ground truth."""
    model = build_detector().eval()
    generator, sizes = model.proposal_generator, []

    def with_classes(images, features, gt_instances):
        sizes.append(NativeSizes("MODEL.DEEPMASK")(images.image_sizes))
        proposals, losses = generator(images, features, gt_instances)
        for x in proposals:
            x.proposal_classes = torch.zeros(len(x), dtype=torch.int64)
        return proposals, losses

    del model.proposal_generator
    model.proposal_generator = with_classes
    inputs = {**make_input(), "native_size": (200, 320)}
    features, labels = collect_block_features(model, [[inputs]], rois_per_image=8, max_rois=8)
    assert len(features) == len(labels) == 8
    assert sizes == [[(200, 320)]]


def test_no_images():
    with pytest.raises(ValueError, match="found no RoI"):
        collect_block_features(build_detector().eval(), [], rois_per_image=4, max_rois=8)


TOOL = ["--config-file", "configs/shapes/zip_detector.yaml"]
OPTS = ["MODEL.DEVICE", "cpu", "MODEL.BN_INCEPTION.WIDTH_FACTOR", "0.125",
        "MODEL.ZIP.HEAD_CHANNELS", "16", "MODEL.ZIP_DETECTOR.CHANNELS", "16",
        "DATASETS.TRAIN", "('boosting_test',)", "DATALOADER.NUM_WORKERS", "0"]  # fmt: skip


@pytest.fixture
def dataset(tmp_path):
    records = []
    for i in range(3):
        path = tmp_path / f"{i}.png"
        noise = np.random.default_rng(i).integers(0, 256, (64, 96, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        boxes = [[8.0, 8, 30, 40], [50.0, 10, 40, 30]]
        annotations = [
            {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": j}
            for j, box in enumerate(boxes)
        ]
        records.append(
            {"file_name": str(path), "image_id": i, "height": 64, "width": 96,
             "annotations": annotations}
        )  # fmt: skip
    DatasetCatalog.register("boosting_test", lambda: records)
    MetadataCatalog.get("boosting_test").thing_classes = [str(i) for i in range(16)]
    yield
    DatasetCatalog.remove("boosting_test")
    MetadataCatalog.remove("boosting_test")


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    model = build_model(make_cfg("shapes/zip_detector.yaml", *OPTS[2:8]))
    path = tmp_path / "model.pth"
    torch.save({"model": model.state_dict()}, path)
    return str(path)


def test_the_tool_writes_what_the_configuration_reads(tmp_path, dataset, checkpoint, capsys):
    output = tmp_path / "boosting.npz"
    main([*TOOL, "--output", str(output), "--max-rois", "40", "--rois-per-image", "16",
          "--num-estimators", "4", "--max-depth", "2", *OPTS,
          "MODEL.WEIGHTS", checkpoint])  # fmt: skip
    printed = capsys.readouterr().out
    assert "to 40 RoIs of 192" in printed and "boosting.npz: " in printed
    cfg = make_cfg("shapes/zip_detector.yaml", *OPTS[2:8])
    cfg.MODEL.ZIP_DETECTOR.BOOSTING_FILE = str(output)
    model = build_model(cfg).eval()
    with torch.no_grad():
        (result,) = model([make_input()])
        confidences, _ = model.roi_heads.box_predictor(torch.rand(5, NUM_FEATURES))
    # So few trees may find background alone.
    assert result["instances"].scores.isfinite().all()
    assert confidences.shape == (5, 17)
    torch.testing.assert_close(confidences.sum(dim=1), torch.ones(5))


@pytest.mark.parametrize(
    "arguments, expected",
    [([], 13), (["--max-features", "5"], 5), (["--max-features", "999"], 192)],
)
def test_decisions_choose_from_the_root_of_the_features_by_default(
    tmp_path, dataset, checkpoint, monkeypatch, arguments, expected
):
    seen = []

    def fit(*args, max_features, **kwargs):
        seen.append(max_features)
        return fit_boosted_trees(*args, max_features=max_features, **kwargs)

    monkeypatch.setattr(boost_detector, "fit_boosted_trees", fit)
    main([*TOOL, "--output", str(tmp_path / "boosting.npz"), "--max-rois", "40",
          "--num-estimators", "2", *arguments, *OPTS, "MODEL.WEIGHTS", checkpoint])  # fmt: skip
    assert seen == [expected]  # of 192


def test_the_tool_says_what_is_wrong_in_one_line(tmp_path):
    config = "configs/shapes/zip_rpn_only.yaml"
    weights = tmp_path / "zip.pth"
    model = build_model(make_cfg(config.removeprefix("configs/"), "MODEL.DEVICE", "cpu"))
    torch.save({"model": model.state_dict()}, weights)
    with pytest.raises(SystemExit, match="Error: Boosting is for ZIP's detector.*ProposalNetwork"):
        main(["--config-file", config, "--output", str(tmp_path / "boosting.npz"),
              "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", str(weights),
              "DATASETS.TRAIN", "()"])  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main([*TOOL, "--max-rois", "0"])
    assert stop.value.code == 2


def test_the_tool_reads_the_categories_that_the_training_has(tmp_path, dataset, checkpoint):
    with pytest.raises(SystemExit, match="Error: DATASETS.CATEGORIES, of 'boosting_test': "):
        main([*TOOL, "--output", str(tmp_path / "boosting.npz"), *OPTS, "MODEL.WEIGHTS", checkpoint,
              "DATASETS.CATEGORIES", "('zebra',)"])  # fmt: skip


def test_the_tool_checks_what_it_needs_before_the_network_runs(
    tmp_path, dataset, checkpoint, monkeypatch, capsys
):
    monkeypatch.setattr(
        boost_detector, "load_trained_model", lambda cfg: pytest.fail("the network came first")
    )
    output = tmp_path / "folder" / "boosting.npz"
    with pytest.raises(SystemExit) as stop:
        main([*TOOL, "--output", str(output), *OPTS])
    assert stop.value.code == 2
    assert "checkpoint in MODEL.WEIGHTS" in capsys.readouterr().err
    opts = [*OPTS, "MODEL.WEIGHTS", checkpoint]
    for path, reason in (
        (tmp_path / "0.png" / "boosting.npz", "File exists|Not a directory"),
        (tmp_path, "it is a folder"),
    ):
        with pytest.raises(SystemExit, match=f"Error: .* cannot be written .({reason})."):
            main([*TOOL, "--output", str(path), *opts])
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(SystemExit, match="Error: .* needs scikit-learn: pip install"):
        main([*TOOL, "--output", str(output), *opts])
    assert not output.parent.exists()
