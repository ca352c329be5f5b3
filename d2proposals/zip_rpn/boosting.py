"""AdaBoost on the features of the follow-up blocks: the detection scores of ZIP's detector.

Source: H. Li, Y. Liu, W. Ouyang, X. Wang, "Zoom Out-and-In Network with Map Attention Decision for
Region Proposal and Object Detection", IJCV 2019 (arXiv 1709.04347), Sec. 4, 5.4 ("feature
boosting").

scikit-learn fits the ensemble of trees (J. Zhu, H. Zou, S. Rosset, T. Hastie, "Multi-class
AdaBoost", Statistics and Its Interface 2009); PyTorch evaluates it, on any device.

Shape shorthand in this module:

    R: number of RoIs
    D: number of features
    K: number of classes, background not counted
    T: number of trees
    Q: nodes of the largest tree
"""

from __future__ import annotations

import os
import zipfile
from typing import Any

import numpy as np
import torch
from torch import nn

from ..files.atomic_files import atomic_write

# Shares of votes are sums of integers of this unit: exact in whatever order a GPU adds them up.
_VOTE_UNITS = 2**40
_TREE_ARRAYS = ("feature", "threshold", "left", "right", "leaf_class")


class BoostedTrees(nn.Module):
    """A fitted AdaBoost ensemble (SAMME) of classification trees.

    The confidence of a class is its share of the trees' weighted votes, in [0, 1]. With S classes
    among the labels that the ensemble was fitted to, scikit-learn's decision function is
    (S * share - 1) / (S - 1): the order of any two decisions is that of their shares.
    """

    def __init__(
        self,
        *,
        feature: np.ndarray,
        threshold: np.ndarray,
        left: np.ndarray,
        right: np.ndarray,
        leaf_class: np.ndarray,
        weights: np.ndarray,
        num_features: int,
        num_classes: int,
    ):
        """
        Args:
            feature: (T, Q) int, the feature in [0, D) that each node looks at.
            threshold: (T, Q) float32; features of at most this go left.
            left: (T, Q) int, node that follows; greater than the node itself, or in a leaf the node
                itself. Node 0 is the root.
            right: the same for features above the threshold.
            leaf_class: (T, Q) int, class in [0, K] of each leaf, K for background.
            weights: (T,) float64, of each tree's vote; positive.
            num_features: D.
            num_classes: K.

        Raises:
            ValueError: the arrays contradict each other.
        """
        super().__init__()
        shape, nodes = feature.shape, np.arange(feature.shape[-1])
        is_leaf = (left == nodes) & (right == nodes)
        is_sound = (
            len(shape) == 2
            and shape[0] > 0
            and all(array.shape == shape for array in (threshold, left, right, leaf_class))
            and weights.shape == shape[:1]
            and bool((np.isfinite(weights) & (weights > 0)).all())
            and bool(((feature >= 0) & (feature < num_features)).all())
            and bool(((leaf_class >= 0) & (leaf_class <= num_classes)).all())
            and bool((is_leaf | ((left > nodes) & (right > nodes))).all())
            and bool((np.maximum(left, right) < shape[1]).all())
        )
        if not is_sound:
            raise ValueError(f"The arrays of these {shape[:1]} boosted trees contradict each other")
        self.num_features = num_features
        self.num_classes = num_classes
        self.depth = _depth(left, right)
        votes = np.rint(weights / weights.sum() * _VOTE_UNITS)
        # Not in the state dict: they come with their own file, not with a checkpoint.
        for name, array, dtype in (
            ("feature", feature, torch.int64),
            ("threshold", threshold, torch.float32),
            ("left", left, torch.int64),
            ("right", right, torch.int64),
            ("leaf_class", leaf_class, torch.int64),
            ("votes", votes, torch.int64),
        ):
            tensor = torch.as_tensor(np.ascontiguousarray(array)).to(dtype)
            self.register_buffer(name, tensor, persistent=False)

    @torch.no_grad()
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Confidences of RoIs.

        Args:
            features: (R, D).

        Returns:
            Tensor: (R, K + 1) float32 in [0, 1], rows sum to 1, background last.
        """
        features = features.float()
        trees = torch.arange(len(self.votes), device=features.device)
        nodes = torch.zeros(len(features), len(trees), dtype=torch.int64, device=features.device)
        for _ in range(self.depth):
            values = features.gather(1, self.feature[trees, nodes])  # (R, T)
            goes_left = values <= self.threshold[trees, nodes]
            nodes = torch.where(goes_left, self.left[trees, nodes], self.right[trees, nodes])
        votes = torch.zeros(len(features), self.num_classes + 1, dtype=torch.int64).to(nodes.device)
        votes.scatter_add_(1, self.leaf_class[trees, nodes], self.votes.expand_as(nodes))
        return votes.float() / votes.sum(dim=1, keepdim=True).float()


def _depth(left: np.ndarray, right: np.ndarray) -> int:
    """Decisions on the longest way from a root to a leaf."""
    nodes = np.arange(left.shape[1])
    # Children come after their parents, so one pass from the last node to the first suffices.
    height = np.zeros(left.shape, dtype=np.int64)
    trees = np.arange(len(left))
    for node in nodes[::-1]:
        children = np.maximum(height[trees, left[:, node]], height[trees, right[:, node]])
        height[:, node] = np.where(left[:, node] == node, 0, children + 1)
    return int(height[:, 0].max())


def check_scikit_learn() -> None:
    """
    Raises:
        ValueError: what fits the trees is missing, or older than 1.6: AdaBoost would then be
            SAMME.R without a word.
    """
    remedy = "pip install 'scikit-learn>=1.6'"
    try:
        import sklearn
        import sklearn.ensemble
        import sklearn.tree  # noqa: F401
    except ImportError as error:
        raise ValueError(f"Fitting the boosting classifier needs scikit-learn: {remedy}") from error
    if tuple(int(part) for part in sklearn.__version__.split(".")[:2]) < (1, 6):
        raise ValueError(
            f"Fitting the boosting classifier needs scikit-learn 1.6 or newer, whose AdaBoost is "
            f"SAMME; this is {sklearn.__version__}: {remedy}"
        )


def fit_boosted_trees(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    num_estimators: int = 200,
    max_depth: int = 4,
    max_features: int | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Fit AdaBoost; needs scikit-learn.

    Args:
        features: (R, D) float32.
        labels: (R,) int in [0, K], K for background.
        num_classes: K.
        num_estimators: T at most; perfect trees end the fit early.
        max_depth: of each tree.
        max_features: how many features, drawn at random, a node chooses from; None for all.
        seed: of these draws.

    Returns:
        dict: the arrays of :func:`save_boosted_trees`.

    Raises:
        ValueError: scikit-learn is missing, or finds no classifier.
    """
    check_scikit_learn()
    from sklearn.ensemble import AdaBoostClassifier
    from sklearn.tree import DecisionTreeClassifier

    if len(np.unique(labels)) < 2:
        raise ValueError(
            f"Boosting needs RoIs of two classes at least; these {len(labels)} have the labels "
            f"{np.unique(labels).tolist()}. Give more images, or a detector with better proposals."
        )
    tree = DecisionTreeClassifier(max_depth=max_depth, max_features=max_features)
    ensemble = AdaBoostClassifier(tree, n_estimators=num_estimators, random_state=seed)
    try:
        ensemble.fit(features, labels)
    except ValueError as error:
        raise ValueError(f"AdaBoost cannot be fitted: {error}") from error
    return _arrays_of(ensemble, features.shape[1], num_classes)


def _arrays_of(ensemble: Any, num_features: int, num_classes: int) -> dict[str, np.ndarray]:
    """The arrays of a fitted ``AdaBoostClassifier`` over ``DecisionTreeClassifier``."""
    # The weights' array may be longer than the list of trees, where the fit ended early.
    estimators = [
        (tree, weight)
        for tree, weight in zip(ensemble.estimators_, ensemble.estimator_weights_, strict=False)
        if weight > 0
    ]
    num_nodes = max(tree.tree_.node_count for tree, _ in estimators)
    shape = (len(estimators), num_nodes)
    # Nodes that a smaller tree does not have are leaves that nothing leads to.
    itself = np.broadcast_to(np.arange(num_nodes), shape)
    arrays = {
        "feature": np.zeros(shape, dtype=np.int64),
        "threshold": np.zeros(shape, dtype=np.float32),
        "left": itself.copy(),
        "right": itself.copy(),
        "leaf_class": np.zeros(shape, dtype=np.int64),
        "weights": np.array([weight for _, weight in estimators], dtype=np.float64),
        "num_features": np.array(num_features),
        "num_classes": np.array(num_classes),
    }
    for i, (tree, _) in enumerate(estimators):
        nodes = tree.tree_
        inner = np.flatnonzero(nodes.children_left >= 0)
        arrays["feature"][i, inner] = nodes.feature[inner]
        arrays["threshold"][i, inner] = _round_down(nodes.threshold[inner])
        arrays["left"][i, inner] = nodes.children_left[inner]
        arrays["right"][i, inner] = nodes.children_right[inner]
        classes = tree.classes_[nodes.value[:, 0].argmax(axis=1)]
        arrays["leaf_class"][i, : nodes.node_count] = classes
    return arrays


def _round_down(threshold: np.ndarray) -> np.ndarray:
    """The greatest float32 not above each float64: float32 features compare as before."""
    rounded = threshold.astype(np.float32)
    return np.where(rounded > threshold, np.nextafter(rounded, np.float32(-np.inf)), rounded)


def save_boosted_trees(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """Write the arguments of :class:`BoostedTrees`, by name, as a ``.npz`` file; atomically."""
    with atomic_write(path, "wb") as file:
        np.savez_compressed(file, **arrays)


def load_boosted_trees(path: str | os.PathLike) -> BoostedTrees:
    """Read what :func:`save_boosted_trees` wrote; runs no code of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or something else.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"Boosting file {path} (MODEL.ZIP_DETECTOR.BOOSTING_FILE) is missing; "
            "tools/boost_detector.py makes it, '' does without."
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in (*_TREE_ARRAYS, "weights")}
            sizes = {name: int(file[name]) for name in ("num_features", "num_classes")}
        return BoostedTrees(**arrays, **sizes)
    # A damaged archive makes NumPy raise any of these, a wrong one KeyError or IndexError.
    except (
        zipfile.BadZipFile, OSError, EOFError, ValueError, KeyError, IndexError, TypeError,
        AttributeError, NotImplementedError, RuntimeError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"Boosting file {path} cannot be read ({reason}): it is cut off or no file of "
            "tools/boost_detector.py; make it again."
        ) from error
