"""Configuration keys of d2proposals, on top of Detectron2's defaults.

Every key has the paper's value as its default, unless its comment says otherwise. One function per
node of the configuration.
"""

from detectron2.config import CfgNode as CN


def add_d2proposals_config(cfg: CN) -> None:
    """Add all keys of d2proposals to ``cfg`` (a Detectron2 configuration), in place."""
    add_common_config(cfg)
    add_execution_config(cfg)
    add_datasets_config(cfg)
    add_input_config(cfg)
    add_solver_config(cfg)
    add_test_config(cfg)
    add_bn_inception_config(cfg)
    add_zoom_network_config(cfg)
    add_zip_config(cfg)
    add_zip_detector_config(cfg)
    add_sc_rpn_config(cfg)
    add_double_head_config(cfg)
    add_vgg_config(cfg)
    add_torchvision_config(cfg)
    add_deepmask_config(cfg)
    add_spop_config(cfg)
    add_detectornet_config(cfg)


def add_common_config(cfg: CN) -> None:
    """Keys of every generator."""
    # Whether a generator decodes proposals while training. R-CNN heads need them;
    # Base-ProposalNetwork.yaml sets False, because the stock ProposalNetwork throws them away.
    cfg.MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING = True

    # Frozen parts (engine/freezing.py): their weights and batch statistics stay in training, and
    # nothing is dropped. A frozen generator makes the proposals of a test: as many as its
    # *_TOPK_TEST keys say, not *_TOPK_TRAIN. One that reads feature maps needs a frozen backbone.
    cfg.MODEL.BACKBONE.FREEZE = False
    cfg.MODEL.PROPOSAL_GENERATOR.FREEZE = False
    # Checkpoints of proposal networks or detectors from which the weights of this part alone are
    # taken (engine/part_weights.py); "": they come with MODEL.WEIGHTS. A training starts from them,
    # whatever MODEL.WEIGHTS has for this part, and --resume goes on without them. --eval-only takes
    # them only where MODEL.WEIGHTS has none of this part: a generator that was trained further in
    # a detector is evaluated as it was saved.
    cfg.MODEL.BACKBONE.WEIGHTS = ""
    cfg.MODEL.PROPOSAL_GENERATOR.WEIGHTS = ""


def add_execution_config(cfg: CN) -> None:
    """Keys of how a model computes (engine/execution.py); results stay, but for rounding."""
    cfg.MODEL.EXECUTION = CN()
    # Layout of weights and maps in memory: "channels_last", "contiguous", or "auto": where it takes
    # less time, channels last, which is on a CPU in a backbone's trunk with depthwise convolutions.
    cfg.MODEL.EXECUTION.MEMORY_FORMAT = "auto"
    # On a CPU, whether frozen batch normalisation is multiplied into the weights of the convolution
    # before it.
    cfg.MODEL.EXECUTION.FOLD_FROZEN_NORM = True
    # Parts that torch.compile makes one graph of: "backbone", "heads" (of the generator and of the
    # RoIs). The first images of new sizes take long.
    cfg.MODEL.EXECUTION.COMPILE = ()
    # By which of torch.compile's backends.
    cfg.MODEL.EXECUTION.COMPILE_BACKEND = "inductor"


def add_datasets_config(cfg: CN) -> None:
    """Keys of the datasets."""
    # COCO-style files of one's own, registered under a name that the other keys and --dataset may
    # then have: [[name, JSON file, folder of the images], ...] (data/coco_files.py). A fourth
    # entry, a year such as 2007, has detections measured as PASCAL VOC's of that year.
    cfg.DATASETS.COCO_FILES = []
    # Categories whose objects are trained on, by name, or "voc" for those of PASCAL VOC under
    # COCO's names; (): all. Objects and crowd regions of the others are as if nobody had annotated
    # them (data/category_choice.py); TEST.PROPOSALS.SEEN measures what that does.
    cfg.DATASETS.CATEGORIES = ()
    # Whether anything that is wrong with the annotations of DATASETS.TRAIN or DATASETS.TEST ends
    # the job before it begins. Otherwise each kind is one warning, and what means nothing is left
    # out (engine/checked_datasets.py).
    cfg.DATASETS.STRICT = False


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
    # What of the chosen object is brought to the medium anchors: "shorter_side" (the released
    # code), drawn uniformly from OBJECT_SIDE in pixels; or "area", whose square root is drawn from
    # AREA_SIDES (the medium anchors' sizes, in pixels), times 1 +- AREA_TOLERANCE. The latter keeps
    # closer to "always positive samples in each batch".
    cfg.INPUT.DY_TRAIN_SCALE.RULE = "shorter_side"
    cfg.INPUT.DY_TRAIN_SCALE.OBJECT_SIDE = (72, 128)
    cfg.INPUT.DY_TRAIN_SCALE.AREA_SIDES = (64, 128)
    cfg.INPUT.DY_TRAIN_SCALE.AREA_TOLERANCE = 0.1
    # Bounds on the resized image's shorter and longer side, in pixels.
    cfg.INPUT.DY_TRAIN_SCALE.MIN_IMAGE_SIDE = 100
    cfg.INPUT.DY_TRAIN_SCALE.MAX_IMAGE_SIDE = 1000
    # A batch is made of images of like sizes, chosen among those of so many batches, so that little
    # padding is computed (Sec. 5.2: "one third less" time). 1: images as they come.
    cfg.INPUT.DY_TRAIN_SCALE.GROUPED_BATCHES = 16


def add_solver_config(cfg: CN) -> None:
    """Keys of the optimizer (engine/optimizer.py)."""
    # "SGD" or "AdaGrad". Modules with an attribute lr_factor multiply their learning rate by it.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Factor on the learning rate of the whole generator, where the detector that it is trained
    # with has another one.
    cfg.SOLVER.PROPOSAL_GENERATOR_LR_FACTOR = 1.0


def add_test_config(cfg: CN) -> None:
    """Keys of the proposal evaluation (evaluation/evaluator.py)."""
    cfg.TEST.PROPOSALS = CN()
    # Numbers of best-scored proposals per image at which recall is measured (at most 2,000).
    cfg.TEST.PROPOSALS.LIMITS = (1, 10, 100, 300, 500, 1000)
    # Whether the proposals of two-stage detectors are measured beside their detections, in the
    # same pass; not with test-time augmentation.
    cfg.TEST.PROPOSALS.OF_DETECTORS = True
    # Whether objects that are marked "difficult" (PASCAL VOC's) count in the recall of proposals,
    # as in SPOP's evaluation. They are trained on either way, as Detectron2 does.
    cfg.TEST.PROPOSALS.COUNT_DIFFICULT = True
    # Categories that the model has seen, as in DATASETS.CATEGORIES: recall of their objects and of
    # the others' is measured apart, too (evaluation/measurement.py); (): no such split.
    cfg.TEST.PROPOSALS.SEEN = ()
    # Measure as masks, too, the filled boxes of all proposals, in the place of masks that they may
    # have: what masks add, or what boxes are worth as masks.
    cfg.TEST.PROPOSALS.BOXES_AS_MASKS = False


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
    # Channels of every level after a 1x1 convolution of its own, for heads that the levels share
    # (RetinaNet's, Sec. 5.6). 0: none, the merged maps as they are, for heads of each level.
    cfg.MODEL.ZOOM_NETWORK.OUT_CHANNELS = 0

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
    # Whether a score is the probability of an object among three classes, as in the released code;
    # the paper says nothing. False: against background alone, so that a level with many gray
    # anchors is not ranked behind the others for them.
    cfg.MODEL.ZIP.GRAY_CLASS.IN_SCORE = True

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
    # The second NMS: thresholds from loose to strict, and how many boxes the ranking holds at most
    # once each has contributed (Gidaris and Komodakis, 2016). () for none: boxes are ranked by
    # their score.
    cfg.MODEL.ZIP.MULTI_NMS_THRESHOLDS = (0.9, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
    cfg.MODEL.ZIP.MULTI_NMS_TOPKS = (3000, 2000, 1000, 800, 400, 200, 100, 50)
    # Proposals per image. The paper's detectors take 300; its AR goes to 1000.
    cfg.MODEL.ZIP.POST_NMS_TOPK_TRAIN = 2000
    cfg.MODEL.ZIP.POST_NMS_TOPK_TEST = 1000
    # Boxes with a side of at most this are dropped, in pixels of the network input.
    cfg.MODEL.ZIP.MIN_BOX_SIZE = 0.0


def add_zip_detector_config(cfg: CN) -> None:
    """Keys of ZIP's detector (zip_rpn/roi_heads.py; Sec. 4). docs/zip.md has Table 6's rows."""
    cfg.MODEL.ZIP_DETECTOR = CN()
    # Sides (square roots of areas) from which on RoIs are pooled from the second, the third ... of
    # MODEL.ROI_HEADS.IN_FEATURES, in pixels of the network input. The paper gives no numbers: half
    # way, in octaves, between the anchors of adjoining levels (32 and 64, 128 and 256).
    cfg.MODEL.ZIP_DETECTOR.LEVEL_SIDES = (45.25, 181.02)
    # Channels after the 1x1 convolution of each level, and of the blocks of res4; res5 has twice
    # as many.
    cfg.MODEL.ZIP_DETECTOR.CHANNELS = 1024
    # Follow-up blocks: res4b15 to res4b20 and res5a to res5c of ResNet-101.
    cfg.MODEL.ZIP_DETECTOR.NUM_RES4_BLOCKS = 6
    cfg.MODEL.ZIP_DETECTOR.NUM_RES5_BLOCKS = 3
    # Stride of the first block of res5. 2: 7x7 bins become 4x4, as in the network whose trained
    # weights the blocks start from. 1 keeps 7x7, for 2.9 times the work in res5.
    cfg.MODEL.ZIP_DETECTOR.RES5_STRIDE = 2
    # Normalisation in the blocks: "FrozenBN" (pre-trained weights), "BN", "SyncBN" or "GN" (from
    # scratch), "" for none.
    cfg.MODEL.ZIP_DETECTOR.NORM = "FrozenBN"
    # Whether a block's stride is in its first convolution (MSRA's weights) or in the 3x3
    # (torchvision's).
    cfg.MODEL.ZIP_DETECTOR.STRIDE_IN_1X1 = False
    # File of tools/boost_detector.py: AdaBoost on the features of all blocks gives the scores in
    # evaluation (Sec. 4, "feature boosting"). "": the network's own scores.
    cfg.MODEL.ZIP_DETECTOR.BOOSTING_FILE = ""


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
    # How far an output of 1 moves a point, in strides. The paper says nothing: 1, as RepPoints. A
    # delta of an anchor of ANCHOR_SIDE 8 moves its edges by 8.
    cfg.MODEL.SCRPN.POINT_UNIT = 1.0
    # Height / width of the anchors of each location; points have none but the square.
    cfg.MODEL.SCRPN.ANCHOR_ASPECT_RATIOS = (1.0,)
    # Probability of an object that an untrained classification gives each location. The paper says
    # nothing: .5, as its code base. Where few samples are positive, the first steps lower all
    # weights of the classification until it can only tell what is no object (docs/claims.md). Their
    # share, such as .04, begins where those steps lead.
    cfg.MODEL.SCRPN.PRIOR_PROB = 0.5
    # Where the second stage looks. "point": at the initial points. "box": evenly over the initial
    # box. "none": at the neighbouring cells.
    cfg.MODEL.SCRPN.ALIGNMENT = "point"
    # Factor on the gradient that point alignment hands to the initial points (RepPoints' value).
    cfg.MODEL.SCRPN.ALIGNMENT_GRADIENT = 0.1
    # Deformable convolution of whole maps: "torchvision" or "gather", equal in value and gradient.
    # "auto": gather on the CPU, where it is faster, torchvision elsewhere. At samples, in
    # training, it always gathers.
    cfg.MODEL.SCRPN.DEFORM_SAMPLER = "auto"

    # Positives of the first stage: "positive_region" (Algorithm 1) or "max_iou" (of anchors).
    cfg.MODEL.SCRPN.INIT_ASSIGNER = "positive_region"
    # Positives of the second stage: "size_aware_threshold" (Algorithm 2) or "max_iou" (of
    # initial proposals).
    cfg.MODEL.SCRPN.REFINED_ASSIGNER = "size_aware_threshold"
    # sigma: sides of the positive region, relative to the object's (Table V).
    cfg.MODEL.SCRPN.SIGMA = 0.2
    # Cells of the positive region (Algorithm 1). "touched": those that it touches, as in the
    # paper's code base, and always the one with the object's centre. "inside": those centred in
    # it, as printed, which leaves 9 % of COCO's objects without.
    cfg.MODEL.SCRPN.POSITIVE_REGION = "touched"
    # k: candidates per object and feature map (Table V).
    cfg.MODEL.SCRPN.TOPK = 9
    # N: feature maps that give an object candidates (Table V).
    cfg.MODEL.SCRPN.NUM_LEVELS = 2
    # Whether an object without a positive in Algorithm 2 gets its candidate with the best IoU,
    # unless that one fits another object better. The paper has no such rule; objects of a few
    # pixels often stay without.
    cfg.MODEL.SCRPN.KEEP_BEST = False
    # "max_iou": (negative below, positive from). The values of RPN, and of Cascade RPN's stage 2.
    cfg.MODEL.SCRPN.INIT_IOU_THRESHOLDS = (0.3, 0.7)
    cfg.MODEL.SCRPN.REFINED_IOU_THRESHOLDS = (0.7, 0.7)
    # "max_iou": an object's best samples are positive from this IoU on, even below the threshold
    # (the compared methods' value).
    cfg.MODEL.SCRPN.MIN_BEST_IOU = 0.3
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
    # Whether proposals are scored with the mask, or by their classification only.
    cfg.MODEL.SCRPN.IOU_MASK.USE_AT_TEST = True
    # With the mask: by the "mean" of classification and mask, or by the "mask" alone, as OLN
    # (arXiv:2108.06753) scores objects of categories that nobody trained on.
    cfg.MODEL.SCRPN.IOU_MASK.SCORE = "mean"
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
    # What the initial and the refined loss are divided by: "positives" (N_reg of Eq. 6, M_reg of
    # Eq. 7) or classification "samples" (as in RPN, and by default in the paper's code base).
    cfg.MODEL.SCRPN.INIT_NORMALIZER = "positives"
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
    # Proposals with a side of at most this are dropped, in pixels of the network input.
    cfg.MODEL.SCRPN.MIN_BOX_SIZE = 0.0


def add_double_head_config(cfg: CN) -> None:
    """Keys of the ROI heads DoubleHeadROIHeads (sc_rpn/double_head.py, SC-RPN's Table IX).

    The layers are those of MODEL.ROI_BOX_HEAD: NUM_FC and FC_DIM of the fully connected head,
    NUM_CONV, CONV_DIM and NORM of the convolution head; BBOX_REG_LOSS_WEIGHT is that of the box
    loss. The values are those of the paper's code base.
    """
    cfg.MODEL.DOUBLE_HEAD = CN()
    # Weight of the classification loss.
    cfg.MODEL.DOUBLE_HEAD.CLS_LOSS_WEIGHT = 2.0
    # Sides of the boxes that the convolution head sees, relative to the proposals'.
    cfg.MODEL.DOUBLE_HEAD.REGRESSION_SCALE = 1.3


def add_spop_config(cfg: CN) -> None:
    """Keys of the generator SPOP (spop/generator.py). docs/spop.md has each figure's variants."""
    cfg.MODEL.SPOP = CN()
    # The trunk that each of the networks has: "deeplab_largefov" (backbones/deeplab_largefov.py,
    # Table I), or build_torchvision_backbone with one map; MODEL.TORCHVISION.MAX_STRIDE 8 gives
    # that the paper's stride and a wide view. WIDTH_FACTOR, NORM and DROPOUT are the former's.
    cfg.MODEL.SPOP.TRUNK = CN()
    cfg.MODEL.SPOP.TRUNK.NAME = "deeplab_largefov"
    # Factor on every layer's number of channels; 1.0 is the paper's network.
    cfg.MODEL.SPOP.TRUNK.WIDTH_FACTOR = 1.0
    # Normalisation after each convolution: "" (none, the paper's), or "GN", "BN", "SyncBN" for
    # training from scratch. Group normalisation sees large images in the parts of TILE_SIZE.
    # "SyncBN" (also MODEL.TORCHVISION.NORM of such a trunk) on several devices needs images of one
    # size: INPUT.WARP_SIZE.
    cfg.MODEL.SPOP.TRUNK.NORM = ""
    # Share of activations dropped after fc6 and fc7 in training (DeepLab's).
    cfg.MODEL.SPOP.TRUNK.DROPOUT = 0.5
    # What the trunk's weights expect: channel order, mean and deviation of values in [0, 255].
    # DeepLab's own: "BGR", (104.008, 116.669, 122.675), (1.0, 1.0, 1.0).
    cfg.MODEL.SPOP.TRUNK.FORMAT = "RGB"
    # The mean, and the deviation, by channel.
    cfg.MODEL.SPOP.TRUNK.PIXEL_MEAN = (123.675, 116.28, 103.53)
    cfg.MODEL.SPOP.TRUNK.PIXEL_STD = (58.395, 57.12, 57.375)
    # Channels of the first convolution of both branches of the confidence network (Fig. 5).
    cfg.MODEL.SPOP.HEAD_CHANNELS = 1024
    # Pixels per unit of the predicted coordinates: the side of the training images.
    cfg.MODEL.SPOP.NORMALIZER = 513.0

    # Localisation networks for large and for small objects (Sec. III-B); False: one for all.
    cfg.MODEL.SPOP.SCALE_AWARE = True
    # Objects of at least this area are large, in pixels of the original image (Table II).
    cfg.MODEL.SPOP.LARGE_AREA = 2000.0
    # Cells drawn of each large object to train the large/small branch (Sec. IV-A).
    cfg.MODEL.SPOP.SAMPLES_PER_LARGE_OBJECT = 100
    # Eq. 1-3: "squared_l2" (half the squared distance, Caffe's loss) or "l2" (as printed).
    cfg.MODEL.SPOP.BBOX_REG_LOSS_TYPE = "squared_l2"
    # Weight of each localisation network's loss, Eq. 1-3.
    cfg.MODEL.SPOP.BBOX_REG_LOSS_WEIGHT = 1.0
    # Weights of the two terms of Eq. 4, objectness and size (large or small).
    cfg.MODEL.SPOP.OBJECTNESS_LOSS_WEIGHT = 1.0
    cfg.MODEL.SPOP.SIZE_LOSS_WEIGHT = 1.0
    # Factor on all of them, for training with a detector.
    cfg.MODEL.SPOP.LOSS_WEIGHT = 1.0
    # Whether the networks learn from images at the size that SCALES refer to (a detector's are
    # enlarged), or as they come: at INPUT.WARP_SIZE, as in the paper (Sec. IV-A).
    cfg.MODEL.SPOP.TRAIN_AT_NATIVE_SIZE = False
    # Factor on the learning rate of the layers that DeepLab does not have (Sec. IV-A).
    cfg.MODEL.SPOP.NEW_LAYER_LR_FACTOR = 10.0

    # Inference. Factors on the image (Sec. III-C); the proposals of all of them are pooled.
    cfg.MODEL.SPOP.SCALES = (1.0, 2.0)
    # SCALES refer to images as they were taken, and a network input that a detector resized is
    # brought back to that size, its longer side to at most so many pixels. Network inputs that have
    # the size of the image stay as large as they are, but their superpixels are those of a copy of
    # at most this longer side. (The paper tests at the images' own size.)
    cfg.MODEL.SPOP.NATIVE_LONG_EDGE = 1333
    # Shorter side of images before they are resized, in pixels, for models that do not tell their
    # generator of it (built by Detectron2's build_model); 0: they are not resized.
    cfg.MODEL.SPOP.NATIVE_SHORT_EDGE = 0
    # Boxes: "fused" (Eq. 5), or of the "large_size" or "small_size" network alone (Fig. 10).
    cfg.MODEL.SPOP.LOCALIZATION = "fused"
    # Images with a side larger than this and the overlap (2 * 240 pixels) go through the networks
    # in parts of this side, in pixels: bounds the memory of the networks.
    cfg.MODEL.SPOP.TILE_SIZE = 1536

    # Superpixel refinement (Sec. III-D): a shrunk and an expanded version of each proposal.
    cfg.MODEL.SPOP.REFINEMENT = CN()
    cfg.MODEL.SPOP.REFINEMENT.ENABLED = True
    # SLIC's number of superpixels and compactness; the paper gives neither.
    cfg.MODEL.SPOP.REFINEMENT.NUM_SUPERPIXELS = 200
    cfg.MODEL.SPOP.REFINEMENT.COMPACTNESS = 10.0
    # Deviation of the Gaussian that smooths the image before SLIC, in pixels; 0 for none. Of a
    # noisy image SLIC makes few superpixels without it. Not in the paper either.
    cfg.MODEL.SPOP.REFINEMENT.SIGMA = 0.0
    # Superpixels touch a proposal with their "pixels", or with their bounding "boxes", as in the
    # released code of the method that the paper follows.
    cfg.MODEL.SPOP.REFINEMENT.STRADDLING = "pixels"

    # Initial proposals, best first, that are refined and enter the NMS in three versions.
    cfg.MODEL.SPOP.PRE_NMS_TOPK_TRAIN = 6000
    cfg.MODEL.SPOP.PRE_NMS_TOPK_TEST = 20000
    # Threshold of the NMS (Sec. IV-A).
    cfg.MODEL.SPOP.NMS_THRESH = 0.8
    # Proposals per image. The paper's detector takes 1,000; its recall goes to 2,000.
    cfg.MODEL.SPOP.POST_NMS_TOPK_TRAIN = 2000
    cfg.MODEL.SPOP.POST_NMS_TOPK_TEST = 1000
    # Boxes with a side of at most this are dropped, in pixels of the network input.
    cfg.MODEL.SPOP.MIN_BOX_SIZE = 0.0


def add_vgg_config(cfg: CN) -> None:
    """Keys of VGG's convolutional layers (backbones/vgg.py)."""
    cfg.MODEL.VGG = CN()
    # Channels of the 3x3 convolutions of each stage; the default is VGG-A.
    cfg.MODEL.VGG.STAGES = [[64], [128], [256, 256], [512, 512], [512, 512]]
    # Factor on every number of channels; 1.0 is the published network.
    cfg.MODEL.VGG.WIDTH_FACTOR = 1.0
    # Normalisation after each convolution: "" (VGG), "BN", "SyncBN" or "FrozenBN".
    cfg.MODEL.VGG.NORM = ""
    # Maps to return; "stage5" is that of conv5_2, before the last pooling.
    cfg.MODEL.VGG.OUT_FEATURES = ["stage5"]
    # The first so many stages are not trained. The papers train all.
    cfg.MODEL.VGG.FREEZE_AT = 0


def add_torchvision_config(cfg: CN) -> None:
    """Keys of torchvision's networks as backbones (backbones/torchvision_backbone.py)."""
    cfg.MODEL.TORCHVISION = CN()
    # Any of torchvision's convolutional classification networks, such as "mobilenet_v2",
    # "efficientnet_b0", "convnext_tiny", "regnet_y_400mf".
    cfg.MODEL.TORCHVISION.NAME = "resnet50"
    # Maps that the backbone returns, by stride. MODEL.FPN.IN_FEATURES names those of a pyramid.
    cfg.MODEL.TORCHVISION.OUT_FEATURES = ["stride4", "stride8", "stride16", "stride32"]
    # Name of torchvision's weights ("IMAGENET1K_V1", downloaded on first use), or a file of a
    # state dictionary under its layer names, whole or features only. "": random.
    cfg.MODEL.TORCHVISION.WEIGHTS = ""
    # The pixels that these weights expect: "torchvision" (RGB, divided by the deviations) or
    # "caffe" (BGR, not divided). INPUT.FORMAT, MODEL.PIXEL_MEAN and .PIXEL_STD must state them for
    # MODEL.BACKBONE, a generator's own FORMAT, PIXEL_MEAN and PIXEL_STD for its trunk.
    cfg.MODEL.TORCHVISION.PIXELS = "torchvision"
    # In the place of batch normalisation: "FrozenBN" (pre-trained weights), "BN", "SyncBN" or "GN"
    # (from scratch). MODEL.BACKBONE.FREEZE_AT k freezes the blocks up to the map of stride 2^k, and
    # those of a generator's own trunk.
    cfg.MODEL.TORCHVISION.NORM = "FrozenBN"
    # Strides above this are traded for dilation, where the layers can be dilated.
    cfg.MODEL.TORCHVISION.MAX_STRIDE = 32
    # Networks with squeeze-excitation, which look at whole maps, see no padding, nor do the
    # statistics of their normalisations.
    cfg.MODEL.TORCHVISION.MASK_PADDING = True
    # What convolutions see beyond a map: "zeros", or "symmetric", the map's own mirror image
    # (cba|abc), for the weights of networks that were trained with it (the released DeepMask).
    cfg.MODEL.TORCHVISION.PADDING = "zeros"


def add_deepmask_config(cfg: CN) -> None:
    """Keys of the generator DeepMask (deepmask/generator.py). docs/deepmask.md has the rows."""
    cfg.MODEL.DEEPMASK = CN()
    # The registered backbone that is the generator's own trunk, with one map (Sec. 3.1: VGG-A).
    cfg.MODEL.DEEPMASK.TRUNK = "build_vgg_backbone"
    # Whether both branches share it. False: one trunk each, such as DeepMask20* has.
    cfg.MODEL.DEEPMASK.SHARED_TRUNK = True
    # Pixels that the trunk expects: channel order, PIXEL_MEAN and PIXEL_STD (torchvision's).
    cfg.MODEL.DEEPMASK.FORMAT = "RGB"
    cfg.MODEL.DEEPMASK.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.DEEPMASK.PIXEL_STD = [58.395, 57.12, 57.375]

    # Side of a patch in pixels, an even multiple of the trunk's stride (Sec. 3.4).
    cfg.MODEL.DEEPMASK.PATCH_SIZE = 224
    # Pixels of the image around a training patch, on each side, that are cut off its map. 0: the
    # trunk sees zeros there, as in the paper. 64: it sees what it does in inference.
    cfg.MODEL.DEEPMASK.CONTEXT = 0
    # Around an image in inference. "context": a border with which windows are centred on every
    # 16th pixel and see CONTEXT pixels around them, as in training. "half_patch": half a patch, so
    # that windows at the border see less, as in the authors' later code.
    cfg.MODEL.DEEPMASK.BORDER = "context"
    # Colour beyond the image, in training and inference, in [0, 255] and the order of FORMAT; ()
    # for the mean colour. The authors' later code: grey, 127.5.
    cfg.MODEL.DEEPMASK.BORDER_COLOR = ()
    # Of the pyramid's images: "area" (averages over what a pixel covers, as training patches), or
    # "bilinear_corners" (samples without averaging, corner pixels on each other, as in the
    # authors' later code).
    cfg.MODEL.DEEPMASK.RESAMPLING = "area"
    # Segmentation branch (Sec. 3.4): channels of its 1x1 convolution, numbers of the low-rank
    # layer (CODE_DIM 0: none, "deepmaskfull"), side of the predicted mask in cells.
    cfg.MODEL.DEEPMASK.MASK_CHANNELS = 512
    cfg.MODEL.DEEPMASK.CODE_DIM = 512
    cfg.MODEL.DEEPMASK.MASK_SIZE = 56
    # From MASK_SIZE to PATCH_SIZE: "bilinear" (Sec. 3.4), "trainable" (a transposed convolution),
    # "none" (masks are learnt from down-sampled ground truth), or "bilinear_corners" (outermost
    # logits at outermost pixels instead of half a cell inside, as in the authors' later code).
    cfg.MODEL.DEEPMASK.UPSAMPLING = "bilinear"
    # Side of the masks that the branch is trained on, in pixels. 0: PATCH_SIZE, or MASK_SIZE
    # without up-sampling.
    cfg.MODEL.DEEPMASK.TARGET_SIZE = 0
    # Whether both branches share the 1x1 convolution and the low-rank layer (the authors' later
    # network). The scoring branch then has one hidden layer, with dropout before its two layers.
    cfg.MODEL.DEEPMASK.SHARED_CODE = False
    # Scoring branch: units of its hidden layers, rate of the dropout after each.
    cfg.MODEL.DEEPMASK.SCORE_DIMS = (512, 1024)
    cfg.MODEL.DEEPMASK.DROPOUT = 0.5

    # Longer side of a canonical object in a patch, in pixels of the patch (Sec. 3.4). All the
    # distances below are in pixels in which the object has this size.
    cfg.MODEL.DEEPMASK.OBJECT_SIZE = 128
    # Positives are jittered by at most JITTER_SHIFT pixels along each axis and JITTER_SCALE
    # octaves; FLIP mirrors half of the patches.
    cfg.MODEL.DEEPMASK.JITTER_SHIFT = 16.0
    cfg.MODEL.DEEPMASK.JITTER_SCALE = 0.25
    cfg.MODEL.DEEPMASK.FLIP = True
    # Negatives are this many pixels (NEGATIVE_SHIFT) or octaves (NEGATIVE_SCALE) away from every
    # canonical positive; at least as many as positives are jittered by.
    cfg.MODEL.DEEPMASK.NEGATIVE_SHIFT = 32.0
    cfg.MODEL.DEEPMASK.NEGATIVE_SCALE = 1.0
    # Scales that negatives are drawn from, evenly in octaves: factors on the native image's size.
    # Wider than the pyramid, as in the authors' later code; the paper gives no range.
    cfg.MODEL.DEEPMASK.NEGATIVE_LOG2_SCALES = (-3.0, 2.0)
    # Whether positives are of these scales, too, unlike in the paper, and negatives
    # of the same with JITTER_SCALE around them: objects of longer sides below 32 or above 1024
    # pixels are neither. False: the smallest positives are more blurred than any negative.
    cfg.MODEL.DEEPMASK.POSITIVES_IN_SCALE_RANGE = True
    # Smaller objects are neither positives nor negatives: area in pixels of the native image, and
    # shorter side. The authors' later code's; the paper has none.
    cfg.MODEL.DEEPMASK.MIN_OBJECT_AREA = 100.0
    cfg.MODEL.DEEPMASK.MIN_OBJECT_SIDE = 5.0
    # Patches per image and iteration (Sec. 3.4: a batch of 32 in all).
    cfg.MODEL.DEEPMASK.BATCH_SIZE_PER_IMAGE = 4
    # Classes (numbers in gt_classes) whose objects are positives; () for all. Objects of
    # OTHER_CATEGORIES are "background", which negatives may show, as for DeepMask20 (Sec. 4), or
    # "ignored": neither positive nor negative.
    cfg.MODEL.DEEPMASK.CATEGORIES = ()
    cfg.MODEL.DEEPMASK.OTHER_CATEGORIES = "background"

    # "alternating": the branches are trained in turn (Sec. 3.2). "joint": both at once.
    cfg.MODEL.DEEPMASK.BRANCHES = "alternating"
    # Whether masks are learnt from negatives, too, as empty ("critical" not to, Sec. 3.2).
    cfg.MODEL.DEEPMASK.MASK_LOSS_ON_NEGATIVES = False
    # lambda of Eq. 1, which is a sum over patches.
    cfg.MODEL.DEEPMASK.SCORE_LOSS_WEIGHT = 1.0 / 32
    # Factor on both losses, for training with a detector.
    cfg.MODEL.DEEPMASK.LOSS_WEIGHT = 1.0

    # Scales of the pyramid in octaves (Sec. 3.4); DeepMaskZoom has 1.5 besides.
    cfg.MODEL.DEEPMASK.LOG2_SCALES = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0)
    # Scales refer to images as they were taken, and a network input that a detector resized is
    # brought back to that size, its longer side to at most so many pixels. Network inputs that have
    # the size of the image stay as large as they are. (The paper tests images as they are.)
    cfg.MODEL.DEEPMASK.NATIVE_LONG_EDGE = 1333
    # Shorter side of images before they are resized, in pixels, for models that do not tell their
    # generator of it (built by Detectron2's build_model); 0: they are not resized.
    cfg.MODEL.DEEPMASK.NATIVE_SHORT_EDGE = 0
    # Probability above which a pixel belongs to a mask (Sec. 3.4: .2 for COCO, .1 for PASCAL).
    cfg.MODEL.DEEPMASK.MASK_THRESH = 0.2
    # Windows of all scales whose masks are predicted, by score.
    cfg.MODEL.DEEPMASK.PRE_NMS_TOPK_TRAIN = 1000
    cfg.MODEL.DEEPMASK.PRE_NMS_TOPK_TEST = 1000
    # IoU threshold of boxes; 1.0 for no NMS, as in the paper.
    cfg.MODEL.DEEPMASK.NMS_THRESH = 1.0
    # Proposals per image.
    cfg.MODEL.DEEPMASK.POST_NMS_TOPK_TRAIN = 1000
    cfg.MODEL.DEEPMASK.POST_NMS_TOPK_TEST = 1000
    # Proposals with a side of at most this are dropped, in pixels of the network input.
    cfg.MODEL.DEEPMASK.MIN_BOX_SIZE = 0.0


def add_detectornet_config(cfg: CN) -> None:
    """Keys of the generator DetectorNet and of DetectorNetHeads (detectornet/)."""
    cfg.MODEL.DETECTORNET = CN()
    # One set of masks for all classes; False: a set for each of MODEL.ROI_HEADS.NUM_CLASSES.
    cfg.MODEL.DETECTORNET.CLASS_AGNOSTIC = True
    # "per_mask": a network for each of the five masks (Sec. 5.1). "per_class_and_mask": also for
    # each class, as in the paper's experiments. "shared": one for all, as Sec. 5.1 suggests.
    cfg.MODEL.DETECTORNET.NETWORKS = "per_mask"
    # Side of the network's input in pixels, and of a mask in cells (Sec. 4).
    cfg.MODEL.DETECTORNET.INPUT_SIZE = 225
    cfg.MODEL.DETECTORNET.MASK_SIZE = 24
    # "alexnet" (Sec. 4), or a registered backbone with one map, such as build_torchvision_backbone,
    # under two fully connected layers.
    cfg.MODEL.DETECTORNET.TRUNK = "alexnet"
    # AlexNet (backbones/alexnet.py): factor on every layer's channels (of another trunk, on the
    # 4,096 of the fully connected ones), normalisation after each convolution ("" for none; "GN" to
    # train from scratch), dropout of fully connected layers.
    cfg.MODEL.DETECTORNET.WIDTH_FACTOR = 1.0
    cfg.MODEL.DETECTORNET.NORM = ""
    cfg.MODEL.DETECTORNET.DROPOUT = 0.5
    # Pixels that AlexNet's weights are for: channel order ("RGB" or "BGR"), means, deviations.
    cfg.MODEL.DETECTORNET.FORMAT = "RGB"
    cfg.MODEL.DETECTORNET.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.DETECTORNET.PIXEL_STD = [58.395, 57.12, 57.375]

    # Crops of each image and training step, on average over the batch: images without enough of
    # a kind get theirs from the others. With "per_class_and_mask", of each class (Sec. 6).
    cfg.MODEL.DETECTORNET.NUM_CROPS = 32
    # The part of them that is positive, and the part of an object that a positive crop covers.
    cfg.MODEL.DETECTORNET.POSITIVE_FRACTION = 0.4
    cfg.MODEL.DETECTORNET.POSITIVE_COVERAGE = 0.8
    # The part of the crops, positive or negative, that is drawn as those of the refinement are:
    # around objects, or of such a shape. 0 in the paper, which tells the refinement's network
    # nothing of such crops: most are smaller or of another aspect ratio than all others.
    cfg.MODEL.DETECTORNET.OBJECT_FRACTION = 0.5
    # Least width of the other crops, relative to the image's, which the paper does not say: of the
    # smallest crops of the refinement (MEAN_DIMENSIONS).
    cfg.MODEL.DETECTORNET.MIN_SCALE = 0.1
    # Random crops that are tried for each one that is wanted.
    cfg.MODEL.DETECTORNET.NUM_TRIES = 50
    # lambda of the loss, which the paper calls small: weight of outputs that are to be 0, beside
    # 1 + lambda for those that are to be 1.
    cfg.MODEL.DETECTORNET.ZERO_WEIGHT = 0.1
    cfg.MODEL.DETECTORNET.LOSS_WEIGHT = 1.0

    # Windows (Sec. 5.3): scales, each of half the size, and the overlap of neighbours.
    cfg.MODEL.DETECTORNET.NUM_SCALES = 3
    cfg.MODEL.DETECTORNET.WINDOW_OVERLAP = 0.2
    # Boxes that are searched (Sec. 5.2): their mean dimension relative to the image's, in (0, 1];
    # a side longer than the image's becomes the image's and the other one longer, ...
    cfg.MODEL.DETECTORNET.MEAN_DIMENSIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    # ... width / height, by k-means over the training boxes (tools/estimate_box_shapes.py; these
    # are of 160 images of COCO 2017), ...
    cfg.MODEL.DETECTORNET.ASPECT_RATIOS = (0.2, 0.31, 0.44, 0.6, 0.8, 1.05, 1.4, 2.06, 3.15, 7.3)
    # ... and the distance between positions, in pixels.
    cfg.MODEL.DETECTORNET.STRIDE = 5.0
    # Sides of the box with the ring around it whose full mask counts against it (Eq. 3), relative
    # to the box's. The paper gives no size.
    cfg.MODEL.DETECTORNET.RING = 1.2
    # Weight of that penalty. Eq. 3 has 1, with which a box inside an object may beat a box that
    # fits it roughly; with 2, boxes are found more exactly (docs/detectornet.md).
    cfg.MODEL.DETECTORNET.RING_WEIGHT = 1.0
    # Weight of the masks of the four halves in the score of a box: 1 in Eq. 3. 0: the full mask and
    # its ring score alone, which cannot tell touching objects apart (Sec. 5.1).
    cfg.MODEL.DETECTORNET.HALVES_WEIGHT = 1.0
    # Detections are covered by the full mask more than this (Eq. 2). Negative: all.
    cfg.MODEL.DETECTORNET.SCORE_THRESH = 0.5
    # Non-maximum suppression of each scale: best boxes of each shape that enter, ...
    cfg.MODEL.DETECTORNET.PRE_NMS_TOPK = 1000
    # ... and how much a box may overlap a better one. "own_area": part of its own area, as in the
    # paper, whose suppression is DPM's. "iou": intersection over union, keeps nested boxes.
    cfg.MODEL.DETECTORNET.NMS_TYPE = "own_area"
    cfg.MODEL.DETECTORNET.NMS_THRESH = 0.5
    # Detections of each scale and class; proposals for another detector need more.
    cfg.MODEL.DETECTORNET.TOPK_PER_SCALE = 5

    cfg.MODEL.DETECTORNET.REFINEMENT = CN()
    # The second regression (Sec. 5.3), in a crop around each detection.
    cfg.MODEL.DETECTORNET.REFINEMENT.ENABLED = True
    # Detections of an image, the best ones, that are refined; the others stay. -1: all (Alg. 1).
    cfg.MODEL.DETECTORNET.REFINEMENT.TOPK = -1
    # Sides of the crop, relative to the detection's.
    cfg.MODEL.DETECTORNET.REFINEMENT.ENLARGEMENT = 1.2
    # Boxes that are searched in the crop: mean dimensions relative to the crop's. The object
    # should fill about 1 / 1.2 of both sides of the crop: most boxes are near that.
    cfg.MODEL.DETECTORNET.REFINEMENT.MEAN_DIMENSIONS = (
        0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95,
    )  # fmt: skip
    # Aspect ratios of these boxes within the crop, which is warped to a square.
    cfg.MODEL.DETECTORNET.REFINEMENT.ASPECT_RATIOS = (
        0.5, 0.57, 0.66, 0.76, 0.87, 1.0, 1.15, 1.32, 1.52, 1.74, 2.0,
    )  # fmt: skip
    # Distance between positions, in pixels of the network's input.
    cfg.MODEL.DETECTORNET.REFINEMENT.STRIDE = 5.0
    # IoU threshold of non-maximum suppression over all refined boxes; 1 for none (Algorithm 1).
    cfg.MODEL.DETECTORNET.FINAL_NMS_THRESH = 1.0
    # Proposals with a side of at most this are dropped, in pixels of the network input.
    cfg.MODEL.DETECTORNET.MIN_BOX_SIZE = 0.0
    # Crops that a network is run on at once in evaluation, which bounds the memory.
    cfg.MODEL.DETECTORNET.CROPS_AT_ONCE = 64

    cfg.MODEL.DETECTORNET.SLIDING_WINDOWS = CN()
    # The windows of the baseline (Sec. 7), generator SlidingWindows: ten mean dimensions relative
    # to the image's, "the largest covers the whole image", ...
    cfg.MODEL.DETECTORNET.SLIDING_WINDOWS.MEAN_DIMENSIONS = (
        0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0,
    )  # fmt: skip
    # ... eight aspect ratios, width / height, which the paper does not say (k-means over
    # 9,323 boxes of 3,000 images of VOC 2007), ...
    cfg.MODEL.DETECTORNET.SLIDING_WINDOWS.ASPECT_RATIOS = (
        0.26, 0.39, 0.56, 0.77, 1.05, 1.46, 2.14, 3.64,
    )  # fmt: skip
    # ... and the distance between positions, in pixels.
    cfg.MODEL.DETECTORNET.SLIDING_WINDOWS.STRIDE = 5.0

    cfg.MODEL.DETECTORNET.CLASSIFIER = CN()
    # The classifier of DetectorNetHeads, which prunes detections (Sec. 5.2). Without it, detections
    # of each class are kept as they are.
    cfg.MODEL.DETECTORNET.CLASSIFIER.ENABLED = True
    # Crops of each image and training step, and the part of them that is positive (Sec. 6).
    cfg.MODEL.DETECTORNET.CLASSIFIER.NUM_CROPS = 32
    cfg.MODEL.DETECTORNET.CLASSIFIER.POSITIVE_FRACTION = 0.4
    # Negative crops have less IoU than the first with every object, positive ones at least the
    # second with some object.
    cfg.MODEL.DETECTORNET.CLASSIFIER.IOU_THRESHOLDS = (0.2, 0.6)
    # Least sides of random crops, relative to the image's.
    cfg.MODEL.DETECTORNET.CLASSIFIER.MIN_SCALE = 0.1
    # Random crops that are tried for each one that is wanted.
    cfg.MODEL.DETECTORNET.CLASSIFIER.NUM_TRIES = 50
    # Factor on its loss.
    cfg.MODEL.DETECTORNET.CLASSIFIER.LOSS_WEIGHT = 1.0
    # Boxes of each scale and class that the generator shows to a classifier of its own before
    # their suppression, as in the paper, which has no such limit (Sec. 5.2); what is beyond the
    # limit is dropped. 0: DetectorNetHeads prune the refined proposals instead.
    cfg.MODEL.DETECTORNET.CLASSIFIER.PRUNING_BUDGET = 0
    # Of the negative crops of DetectorNetHeads, the part that proposals make up in training, as
    # far as they are negatives: hard negatives mined before (Sec. 7).
    cfg.MODEL.DETECTORNET.CLASSIFIER.HARD_FRACTION = 0.0
