"""Configuration keys of d2proposals, on top of Detectron2's defaults.

Every key has the paper's value as its default. One function per node of the configuration.
"""

from detectron2.config import CfgNode as CN


def add_d2proposals_config(cfg: CN) -> None:
    """Add all keys of d2proposals to ``cfg`` (a Detectron2 configuration), in place."""
    add_common_config(cfg)
    add_input_config(cfg)
    add_solver_config(cfg)
    add_test_config(cfg)
    add_bn_inception_config(cfg)
    add_zoom_network_config(cfg)
    add_zip_config(cfg)
    add_sc_rpn_config(cfg)


def add_common_config(cfg: CN) -> None:
    """Keys of every generator."""
    # Whether a generator decodes proposals while training. R-CNN heads need them;
    # Base-ProposalNetwork.yaml sets False, because the stock ProposalNetwork throws them away.
    cfg.MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING = True


def add_input_config(cfg: CN) -> None:
    """Keys of the one dataset mapper (data/mapper.py)."""
    # Pass the instance masks on to the generator without building a mask head.
    cfg.INPUT.USE_INSTANCE_MASK = False
    # (height, width) to which training images are warped, aspect ratio ignored; () for none.
    cfg.INPUT.WARP_SIZE = ()

    # ZIP's dyTrainScale (Sec. 3.3): each training image is resized so that one of its objects is
    # covered by the medium anchors.
    cfg.INPUT.DY_TRAIN_SCALE = CN()
    cfg.INPUT.DY_TRAIN_SCALE.ENABLED = False
    # The chosen object's shorter side is drawn uniformly from this range, in pixels.
    cfg.INPUT.DY_TRAIN_SCALE.OBJECT_SIDE = (72, 128)
    # Bounds on the resized image's shorter and longer side, in pixels.
    cfg.INPUT.DY_TRAIN_SCALE.MIN_IMAGE_SIDE = 100
    cfg.INPUT.DY_TRAIN_SCALE.MAX_IMAGE_SIDE = 1000


def add_solver_config(cfg: CN) -> None:
    """Keys of the optimizer (engine/optimizer.py)."""
    # "SGD" or "AdaGrad". Modules with an attribute lr_factor multiply their learning rate by it.
    cfg.SOLVER.OPTIMIZER = "SGD"


def add_test_config(cfg: CN) -> None:
    """Keys of the proposal evaluation (evaluation/evaluator.py)."""
    cfg.TEST.PROPOSALS = CN()
    # Numbers of best-scored proposals per image at which recall is measured (at most 2,000).
    cfg.TEST.PROPOSALS.LIMITS = (1, 10, 100, 300, 500, 1000)


def add_bn_inception_config(cfg: CN) -> None:
    """Keys of the BN-Inception backbone (backbones/bn_inception.py)."""
    cfg.MODEL.BN_INCEPTION = CN()
    # Maps that the backbone returns, by block.
    cfg.MODEL.BN_INCEPTION.OUT_FEATURES = ["inception_3b", "inception_4d", "inception_5b"]
    # Factor on every layer's number of channels; 1.0 is the published network.
    cfg.MODEL.BN_INCEPTION.WIDTH_FACTOR = 1.0
    # Normalisation: "FrozenBN" (pre-trained weights), "BN", "SyncBN" or "GN" (from scratch), "" for
    # none. MODEL.BACKBONE.FREEZE_AT counts conv1, conv2, 3a-3b, 3c-4d and 4e-5b as stages 1 to 5.
    cfg.MODEL.BN_INCEPTION.NORM = "FrozenBN"
    # Blocks stacked after 3b, 4d and 5b: the deeper zoom-out network of ZIP's Table 1 (e).
    cfg.MODEL.BN_INCEPTION.EXTRA_BLOCKS = (0, 0, 0)


def add_zoom_network_config(cfg: CN) -> None:
    """Keys of the zoom out-and-in network (zip_rpn/zoom_network.py; ZIP, Sec. 3.1-3.2)."""
    cfg.MODEL.ZOOM_NETWORK = CN()
    # The registered backbone that zooms out, and its three maps F1, F2, F3 (strides 8, 16, 32).
    cfg.MODEL.ZOOM_NETWORK.BOTTOM_UP = "build_bn_inception_backbone"
    cfg.MODEL.ZOOM_NETWORK.IN_FEATURES = ["inception_3b", "inception_4d", "inception_5b"]
    # Whether there is a zoom-in path (Table 1 d) or the zoom-out network alone (Table 1 a-c, e).
    cfg.MODEL.ZOOM_NETWORK.ZOOM_IN = True
    # Number of mirrored blocks on levels 3, 2 and 1. (2, 4, 2) mirrors 5b 5a, 4d 4c 4b 4a and
    # 3b 3a, "exactly the mirrored version" of Sec. 3.1; the released network has (2, 2, 0).
    cfg.MODEL.ZOOM_NETWORK.MIRROR_DEPTHS = (2, 4, 2)
    # Normalisation of the zoom-in path; "" for none. As BN_INCEPTION.NORM in the paper.
    cfg.MODEL.ZOOM_NETWORK.NORM = "FrozenBN"

    # The map attention decision (MAD) unit, Sec. 3.2.
    cfg.MODEL.ZOOM_NETWORK.MAD = CN()
    # "channel": Eq. 1-2. "spatial" and "excitation": the alternatives of Table 2. "none": the
    # concatenated maps as they are (Table 1 d).
    cfg.MODEL.ZOOM_NETWORK.MAD.TYPE = "channel"
    # lambda of Eq. 8: number of map sources on levels 1 and 2. 2: F and H (Eq. 1). 4: also the
    # zoom-out maps of the two other levels, projected to C channels and resampled.
    cfg.MODEL.ZOOM_NETWORK.MAD.LAMBDA = 2
    # Activation of the attention vector: "none" (the paper mentions none), "sigmoid" or "relu".
    cfg.MODEL.ZOOM_NETWORK.MAD.ACTIVATION = "none"
    # Reduction of the hidden layer in the "excitation" variant (Hu et al., 2017).
    cfg.MODEL.ZOOM_NETWORK.MAD.REDUCTION = 16


def add_zip_config(cfg: CN) -> None:
    """Keys of the generator ZIP (zip_rpn/generator.py)."""
    cfg.MODEL.ZIP = CN()
    # Feature maps, one detection level each, high to low resolution. The anchors of each level
    # are those of MODEL.ANCHOR_GENERATOR (Sec. 3.3: two scales, five aspect ratios).
    cfg.MODEL.ZIP.IN_FEATURES = ["zoom1", "zoom2", "zoom3"]
    # Channels of the 3x3 convolution before the two predictions of a level.
    cfg.MODEL.ZIP.HEAD_CHANNELS = 512
    # One head for all levels (needs equal channels); the paper's levels have their own.
    cfg.MODEL.ZIP.SHARED_HEAD = False

    # Labels by the anchor's best IoU with an object (Sec. 3.3). In between: not sampled.
    cfg.MODEL.ZIP.POSITIVE_IOU = 0.6
    cfg.MODEL.ZIP.NEGATIVE_IOU = 0.25
    # Negatives have at least this IoU. 0: all of the background counts, as the paper's text.
    cfg.MODEL.ZIP.NEGATIVE_IOU_MIN = 0.0
    # Whether each object's best anchors are positive whatever their IoU (not in the paper).
    cfg.MODEL.ZIP.LOW_QUALITY_MATCH = False

    # The gray class (grayCls in Table 2); False: two classes, as in Table 1.
    cfg.MODEL.ZIP.GRAY_CLASS = CN()
    cfg.MODEL.ZIP.GRAY_CLASS.ENABLED = True
    cfg.MODEL.ZIP.GRAY_CLASS.IOU = (0.35, 0.55)
    # Gray samples per positive or negative sample.
    cfg.MODEL.ZIP.GRAY_CLASS.RATIO = 0.5

    # Samples of one level in one image, and how many may be of one class (Sec. 5.1).
    cfg.MODEL.ZIP.BATCH_SIZE_PER_IMAGE = 300
    cfg.MODEL.ZIP.BATCH_SIZE_PER_CLASS = 100
    # Limit on the number of negatives (equilibrium in Table 2); False: negatives fill the batch.
    cfg.MODEL.ZIP.EQUILIBRIUM = CN()
    cfg.MODEL.ZIP.EQUILIBRIUM.ENABLED = True
    # Negatives per positive at most.
    cfg.MODEL.ZIP.EQUILIBRIUM.NEGATIVE_RATIO = 2.0
    # Share of the batch that negatives may take on a level without positives.
    cfg.MODEL.ZIP.EQUILIBRIUM.SHARE_WITHOUT_POSITIVES = 0.25

    # Regression loss: "squared_l2" (Eq. 6) or "smooth_l1".
    cfg.MODEL.ZIP.BBOX_REG_LOSS_TYPE = "squared_l2"
    cfg.MODEL.ZIP.SMOOTH_L1_BETA = 1.0
    cfg.MODEL.ZIP.BBOX_REG_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
    cfg.MODEL.ZIP.BBOX_REG_LOSS_WEIGHT = 1.0
    cfg.MODEL.ZIP.LOSS_WEIGHT = 1.0

    # Inference (Sec. 3.4). Boxes of a level that enter its NMS, by score.
    cfg.MODEL.ZIP.PRE_NMS_TOPK_TRAIN = 6000
    cfg.MODEL.ZIP.PRE_NMS_TOPK_TEST = 6000
    # The initial NMS of each level, and how many boxes of a level it keeps.
    cfg.MODEL.ZIP.LEVEL_NMS_THRESH = 0.5
    cfg.MODEL.ZIP.LEVEL_NMS_TOPK = 2000
    # Added to the probabilities of each level before levels are merged ("a bias term for each
    # level", tuned on held-out images); one number per level, () for none.
    cfg.MODEL.ZIP.LEVEL_BIAS = ()
    # The second NMS: thresholds from loose to strict, and how many boxes each may contribute
    # (Gidaris and Komodakis, 2016). () for none: boxes are ranked by their score.
    cfg.MODEL.ZIP.MULTI_NMS_THRESHOLDS = (0.9, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
    cfg.MODEL.ZIP.MULTI_NMS_TOPKS = (3000, 2000, 1000, 800, 400, 200, 100, 50)
    # Proposals per image. The paper's detectors take 300; its AR goes to 1000.
    cfg.MODEL.ZIP.POST_NMS_TOPK_TRAIN = 2000
    cfg.MODEL.ZIP.POST_NMS_TOPK_TEST = 1000
    # Boxes with a side below this are dropped, in pixels of the network input.
    cfg.MODEL.ZIP.MIN_BOX_SIZE = 0.0


def add_sc_rpn_config(cfg: CN) -> None:
    """Keys of the generator SCRPN (sc_rpn/generator.py). docs/sc_rpn.md has each table's rows."""
    cfg.MODEL.SCRPN = CN()
    # Feature maps, high to low resolution, with equal channels (Sec. III: P2-P6).
    cfg.MODEL.SCRPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    # Channels of the hidden maps of the head, which all feature maps share.
    cfg.MODEL.SCRPN.HEAD_CHANNELS = 256
    # 3x3 convolutions before both stages. The paper shows none.
    cfg.MODEL.SCRPN.NUM_CONVS = 0
    # 2: initial proposals are aligned, classified and refined. 1: they are final, as RPN's.
    cfg.MODEL.SCRPN.NUM_STAGES = 2
    # "points": nine points and the box around them (Sec. III-C). "box": anchors and deltas.
    cfg.MODEL.SCRPN.REPRESENTATION = "points"
    # Side of the square on which points begin, or of the anchors, in strides.
    cfg.MODEL.SCRPN.ANCHOR_SIDE = 8.0
    # Height / width of the anchors of each location; points have none but the square.
    cfg.MODEL.SCRPN.ANCHOR_ASPECT_RATIOS = (1.0,)
    # Where the second stage looks. "point": at the initial points. "box": evenly over the initial
    # box. "none": at the neighbouring cells.
    cfg.MODEL.SCRPN.ALIGNMENT = "point"
    # Factor on the gradient that point alignment hands to the initial points (RepPoints' value).
    cfg.MODEL.SCRPN.ALIGNMENT_GRADIENT = 0.1
    # Deformable convolution: "torchvision" or "gather", equal in value and gradient. "auto":
    # gather on the CPU, where it is faster, torchvision elsewhere.
    cfg.MODEL.SCRPN.DEFORM_SAMPLER = "auto"

    # Positives of the first stage: "positive_region" (Algorithm 1) or "max_iou" (of anchors).
    cfg.MODEL.SCRPN.INIT_ASSIGNER = "positive_region"
    # Positives of the second stage: "size_aware_threshold" (Algorithm 2) or "max_iou" (of
    # initial proposals).
    cfg.MODEL.SCRPN.REFINED_ASSIGNER = "size_aware_threshold"
    # sigma: sides of the positive region, relative to the object's (Table V).
    cfg.MODEL.SCRPN.SIGMA = 0.2
    # k: candidates per object and feature map (Table V).
    cfg.MODEL.SCRPN.TOPK = 9
    # N: feature maps that give an object candidates (Table V).
    cfg.MODEL.SCRPN.NUM_LEVELS = 2
    # "max_iou": (negative below, positive from). The values of RPN, and of Cascade RPN's stage 2.
    cfg.MODEL.SCRPN.INIT_IOU_THRESHOLDS = (0.3, 0.7)
    cfg.MODEL.SCRPN.REFINED_IOU_THRESHOLDS = (0.7, 0.7)
    # Classification samples per image: all positives, filled up with random negatives, which are
    # at least as many. The paper gives no number.
    cfg.MODEL.SCRPN.BATCH_SIZE_PER_IMAGE = 256

    # The light-weight IoU-mask branch (Sec. III-A).
    cfg.MODEL.SCRPN.IOU_MASK = CN()
    cfg.MODEL.SCRPN.IOU_MASK.ENABLED = True
    # Map that predicts it (Table VII): "reg", "cls" or "fused" (their sum).
    cfg.MODEL.SCRPN.IOU_MASK.FEATURE = "reg"
    # Samples that train it (Table VI): "classification", "regression" (positives) or
    # "regression_and_negatives" (positives and all negatives).
    cfg.MODEL.SCRPN.IOU_MASK.SAMPLES = "classification"
    # Sigmoids: two keep the mask within (0.5, 0.731), one within (0, 1).
    cfg.MODEL.SCRPN.IOU_MASK.NUM_SIGMOID = 2
    # Whether proposals are scored by the mean of classification and mask, or classification only.
    cfg.MODEL.SCRPN.IOU_MASK.USE_AT_TEST = True
    # lambda_mask of Eq. 3.
    cfg.MODEL.SCRPN.IOU_MASK.LOSS_WEIGHT = 1.0

    # Regression losses of the first and the second stage: "iou" (-ln IoU) or "smooth_l1" (of
    # deltas, needs REPRESENTATION "box").
    cfg.MODEL.SCRPN.BBOX_REG_LOSS_TYPE = ("iou", "iou")
    cfg.MODEL.SCRPN.SMOOTH_L1_BETA = 1.0 / 9
    # lambda_cls, lambda_init and lambda_refined of Eq. 3.
    cfg.MODEL.SCRPN.CLS_LOSS_WEIGHT = 2.0
    cfg.MODEL.SCRPN.INIT_LOSS_WEIGHT = 0.5
    cfg.MODEL.SCRPN.REFINED_LOSS_WEIGHT = 10.0
    # What the refined loss is divided by: "positives" (M_reg of Eq. 7) or classification "samples"
    # (the default of the paper's code base; a gentler loss for training from scratch).
    cfg.MODEL.SCRPN.REFINED_NORMALIZER = "positives"
    # Factor on all of them, for training with a detector.
    cfg.MODEL.SCRPN.LOSS_WEIGHT = 1.0

    # Inference: the best proposals of each feature map enter its NMS; a second NMS is over all
    # maps (Sec. III). The paper gives one threshold (Sec. IV-A) and no number.
    cfg.MODEL.SCRPN.PRE_NMS_TOPK_TRAIN = 2000
    cfg.MODEL.SCRPN.PRE_NMS_TOPK_TEST = 2000
    cfg.MODEL.SCRPN.LEVEL_NMS_THRESH = 0.8
    cfg.MODEL.SCRPN.NMS_THRESH = 0.8
    # Proposals per image.
    cfg.MODEL.SCRPN.POST_NMS_TOPK_TRAIN = 2000
    cfg.MODEL.SCRPN.POST_NMS_TOPK_TEST = 1000
    # Proposals with a side below this are dropped, in pixels of the network input.
    cfg.MODEL.SCRPN.MIN_BOX_SIZE = 0.0
