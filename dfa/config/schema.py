"""The run as typed dataclasses: every field, its default, its allowed values, and where the default comes from."""

from dataclasses import dataclass, field
from typing import Any


def _number(default: Any, low: float, high: float) -> Any:
    return field(default=default, metadata={"range": (low, high)})


def _choice(default: Any, *options: Any) -> Any:
    return field(default=default, metadata={"choices": options})


def _listed(*default: Any) -> Any:
    return field(default_factory=lambda: list(default))


@dataclass
class DataConfig:
    """Which images, and where their labels come from; `python -m jobs.shard` reads it."""

    source: str = _choice("voc", "voc", "coco", "folder")
    root: str = ""  # VOC: the folder with JPEGImages, or a parent; COCO and folder: the images
    split: str = "train"  # VOC: ImageSets/Segmentation/SPLIT.txt
    labels: str = _choice("auto", "auto", "annotations", "file", "masks")  # masks: never by itself, only by this name
    label_file: str = ""  # text (VOC, COCO), CSV or JSON lines (folder)
    label_kind: str = _choice("names", "names", "index_from_0", "index_from_1")  # what a label file's entries are
    image_column: str = "image"  # CSV, JSON lines
    label_column: str = "labels"
    separator: str = ";"
    annotations: str = ""  # COCO: the instances JSON
    masks: str = ""  # ground truth: folder of PNGs (VOC: its name; COCO: "annotations"); "": shards without masks
    crowd: str = _choice("class", "class", "void", "drop")  # COCO: what a crowd region is
    # name of a YAML in conf/, or a path; auto: what the data names (folders, the labels of a table, COCO's categories)
    classes: str = "classes_voc"
    unlabelled: str = _choice("reject", "reject", "background")
    samples_per_shard: int = _number(256, 1, 100_000)
    shuffle: bool = True
    max_pixels: int = _number(50_000_000, 1_000, 1_000_000_000)
    apply_exif: bool = False  # pictures, and so masks, are as viewers turn them (EXIF), in shards and for jobs/predict
    max_reject_share: float = _number(0.05, 0.0, 1.0)
    output: str = ""  # folder of the shards to write


@dataclass
class ShardsConfig:
    """Where the shards of the splits are (each folder made by jobs/shard)."""

    train: str = ""
    val: str = ""
    test: str = ""  # images without ground truth, for a test server; no labels are needed either
    labels: str = ""  # loss.supervision=labels: a folder that jobs/pseudo_label wrote for the train shards, or follows


@dataclass
class ClipConfig:
    """The frozen encoder (METHOD 1.1, 1.2 and "Patch-text similarity")."""

    model: str = "ViT-B-16-quickgelu"  # open_clip name, or the path of a model JSON
    checkpoint: str = "openai"  # open_clip tag, path of a weight file, or "random"
    others: list[str] = (
        _listed()
    )  # MODEL@CHECKPOINT of further CLIPs, whose similarity and attention are averaged with it
    precision: str = _choice("fp32", "fp32", "bf16", "fp16")
    mean: list[float] = _listed(0.48145466, 0.4578275, 0.40821073)
    std: list[float] = _listed(0.26862954, 0.26130258, 0.27577711)
    attention_blocks: int = _number(8, 1, 64)  # the last n blocks feed the affinities
    token_blocks: int = _number(0, 0, 64)  # the first n blocks feed the decoder; 0: all but the last
    similarity: str = _choice("surgery", "raw", "value", "surgery")
    surgery_blocks: int = _number(5, 1, 64)


@dataclass
class CropConfig:
    """Training crops (METHOD 1.21)."""

    size: int = _number(320, 16, 4096)
    scale_min: float = _number(0.5, 0.05, 10.0)
    scale_max: float = _number(2.0, 0.05, 10.0)
    flip: float = _number(0.5, 0.0, 1.0)
    long_side: int = _number(0, 0, 8192)  # larger images count as this large before the scale is drawn; 0: none does


@dataclass
class AffinityConfig:
    """Affinities (METHOD 1.3-1.5)."""

    source: str = _choice("attention", "attention", "attention+features")
    heads: str = _choice(
        "mean", "mean", "all"
    )  # channels of the learned maps: a block's mean over heads, or every head
    high_prior: str = _choice("inverse", "inverse", "attention")  # where P_inv starts: as I - W, or as W
    hidden: int = _number(16, 1, 1024)
    clip: float = _number(5.0, 0.1, 50.0)
    sinkhorn_rounds: int = _number(3, 0, 100)
    use_from_step: int = _number(0, 0, 100_000_000)  # labels before this step are made with the un-learned affinities
    encoder: str = ""  # timm name of a second frozen ViT whose token cosines are channels too; "": none
    encoder_checkpoint: str = "pretrained"  # timm's own weights, path of a weight file, or "random"
    encoder_blocks: int = _number(1, 1, 64)  # its last n blocks, one channel each


@dataclass
class FrequencyConfig:
    """Decoder bands and what is read from them (METHOD 1.6-1.12)."""

    mu: float = _number(0.4, 0.0, 1.0)
    mu_as: str = _choice("half_width", "half_width", "side", "area")
    relation_gain: float = _number(5.0, 0.01, 100.0)
    use_quality_mask: bool = True  # false: L_a transfers every pair, whatever dense says
    dense: str = _choice("mean", "mean", "row_mean", "share", "alpha")  # what M_d selects: core.rectify.dense_mask
    dense_share: float = _number(0.5, 1e-3, 0.999)  # dense=share: of the pairs
    teacher: str = _choice("softmax", "softmax", "logit", "sum")  # S_l as a distribution: core.rectify.alignment_loss
    alignment: str = _choice(
        "divergence", "divergence", "inside_mask", "full_row"
    )  # over which pairs: the same function
    window: int = _number(9, 0, 10_000)  # METHOD 1.11; 9 belongs to a 20 x 20 grid
    resolve_unreliable: bool = True
    agreement: str = _choice("both", "both", "labels")  # of S_h and the labels, or of the labels alone: METHOD 1.10
    rectified_pairs: str = _choice(
        "all", "all", "foreground"
    )  # foreground: pairs of two background patches do not count


@dataclass
class CamConfig:
    """Transport CAM and its background (METHOD 1.14-1.18)."""

    generator: str = _choice("transport", "similarity", "affinity", "elementwise", "transport")
    lambda_low: float = _number(1.0, 0.0, 100.0)
    lambda_high: float = _number(0.1, 0.0, 100.0)
    form: str = _choice("propagate", "row_term", "row_term_foreground", "propagate", "both")
    propagation: int = _number(1, 1, 16)  # how often the affinity is applied
    columns: str = _choice("strongest", "strongest", "prompts", "constant")  # the background's: label.seed.SeedSettings
    constant: float = _number(0.5, 0.0, 1.0)  # score of the constant column
    scale: float = _number(0.0, 0.0, 1000.0)  # on cosines; 0: the CLIP's own exp(logit_scale)
    marginal: str = _choice("area", "area", "softmax_mean", "softmax_sum", "uniform")  # core.transport.class_marginal
    marginal_temperature: float = _number(0.15, 1e-3, 100.0)  # of the marginal's softmax
    epsilon: float = _number(0.1, 1e-3, 10.0)
    iterations: int = _number(100, 1, 10_000)
    tolerance: float = _number(1e-3, 1e-9, 1.0)
    normalization: str = _choice(
        "row", "row", "column"
    )  # of the plan: a patch's shares, or each column over its maximum
    background: str = _choice("constant", "constant", "power", "prompts")
    threshold: float = _number(0.4, 0.0, 1.0)  # of the constant background
    power: float = _number(1.0, 0.01, 20.0)


@dataclass
class PseudoLabelConfig:
    """Pseudo-labels during training (METHOD 1.18): pixel-adaptive refinement and the undecided band."""

    refine: bool = True
    iterations: int = _number(10, 0, 100)
    dilations: list[int] = _listed(1, 2, 4, 8, 12, 24)
    colour_scale: float = _number(0.3, 1e-3, 100.0)
    position_scale: float = _number(0.3, 1e-3, 100.0)
    position_weight: float = _number(0.01, 0.0, 1.0)
    stride: int = _number(1, 1, 8)
    band: list[float] = _listed()  # [low, high] around the background score that becomes 255, or []


@dataclass
class DecoderConfig:
    """The student's decoder (METHOD 1.20)."""

    width: int = _number(256, 8, 4096)
    depth: int = _number(3, 0, 24)
    heads: int = _number(8, 1, 64)
    mlp_ratio: float = _number(4.0, 0.5, 16.0)
    dropout: float = _number(0.1, 0.0, 0.9)
    normalize_tokens: bool = True
    mixer: str = _choice("attention", "attention", "spam", "hybrid")  # METHOD 4; hybrid: spam first, then attention
    radius: float = _number(2.0, 0.1, 1_000.0)  # spam: the low band, an open disc of so many bins; 1: the mean
    drop: float = _number(0.0, 0.0, 0.9)  # spam: stochastic depth
    grid: float = _number(0.0, 0.0, 1.0)  # feature truncation: share of the patch grid's sides; 0: off


@dataclass
class LossConfig:
    """Weights of METHOD 1.19, and what supervises."""

    alignment: float = _number(0.1, 0.0, 100.0)  # lambda_1
    rectification: float = _number(0.2, 0.0, 100.0)  # lambda_2
    # labels: masks of shards.labels, a second stage; masks: ground truth, the fully supervised bound, never a result
    supervision: str = _choice("pseudo", "pseudo", "labels", "masks")
    annotation_grid: int = _number(
        0, 0, 4096
    )  # what supervises, block-wise: blocks along a crop (2 nu_max + 1); 0: as it is


@dataclass
class FfrConfig:
    """FFR's own numbers, for method ffr and dfa+ffr (METHOD 2); its bands are those of `frequency`."""

    high: float = _number(2.0, 0.0, 100.0)  # lambda_h
    rectification: float = _number(1.0, 0.0, 100.0)  # lambda_1
    classifier: float = _number(1.0, 0.0, 100.0)  # weight of the intermediate classifier's loss
    confidence: float = _number(0.6, 0.0, 1.0)  # CAM above it: a confident token
    fallback_share: float = _number(0.1, 1e-3, 1.0)  # of the tokens, where none is confident
    deviations: float = _number(1.0, 0.0, 10.0)  # selected: |a - l| > mean + so many standard deviations
    block: int = _number(0, 0, 64)  # token block of the intermediate classifier; 0: the middle one
    high_labels: str = _choice("intermediate", "intermediate", "same")  # what the second head learns from


@dataclass
class TrainConfig:
    """Optimisation (METHOD 1.21) and the machinery around it."""

    steps: int = _number(30_000, 1, 100_000_000)
    batch_size: int = _number(4, 1, 1_000_000)  # of one optimizer step, over all workers
    micro_batch_size: int = _number(0, 0, 1_000_000)  # at most, of a forward pass on a worker; 0: batch_size / workers
    learning_rate: float = _number(1e-4, 0.0, 10.0)
    decoder_rate_scale: float = _number(10.0, 0.0, 1000.0)
    affinity_rate_scale: float = _number(100.0, 0.0, 10_000.0)
    weight_decay: float = _number(1e-2, 0.0, 10.0)
    warmup_steps: int = _number(50, 0, 1_000_000)
    decay_power: float = _number(1.0, 0.0, 10.0)
    clip_norm: float = _number(1.0, 0.0, 1e6)  # 0: no clipping
    ema_decay: float = _number(0.0, 0.0, 0.999999)  # moving average of the weights, kept beside them; 0: none
    precision: str = _choice("fp32", "fp32", "bf16", "fp16")
    engine: str = _choice("auto", "auto", "deepspeed", "torch")  # auto: DeepSpeed where it is installed
    zero_stage: int = _choice(1, 0, 1, 2)
    workers: int = _number(1, 1, 100_000)
    min_workers: int = _number(
        0, 0, 100_000
    )  # train with as many as there is room for, from this to workers; 0: workers
    resize_interval_s: float = _number(60.0, 1.0, 86_400.0)  # min_workers: how often to look for room for more
    worker_cpus: float = _number(0.0, 0.0, 1_024.0)  # CPUs that a worker reserves; 0: chosen by what there is
    max_failures: int = _number(3, 0, 1_000_000)  # failures in a row without a checkpoint between them
    collective_timeout_s: int = _number(600, 1, 86_400)  # ranks that wait so long for another one take it for hung
    use_gpu: bool = False
    compile: bool = False  # torch.compile of CLIP's layers: no gain on a processor (0.98), on a GPU not measured
    seed: int = _number(0, 0, 2**31 - 1)
    validate_every: int = _number(2_000, 1, 100_000_000)
    validate_images: int = _number(0, 0, 100_000_000)  # the first n of the validation shards; 0: all
    checkpoint_every: int = _number(500, 1, 100_000_000)
    keep_checkpoints: int = _number(2, 1, 1_000)
    log_every: int = _number(20, 1, 1_000_000)
    mlflow: str = ""  # MLflow's tracking address, to which metrics go too; "": none
    history: bool = False  # write down who trained which sample when; `python -m jobs.history` checks it


@dataclass
class CrfConfig:
    """Dense CRF (METHOD 1.22)."""

    preset: str = _choice("deeplab", "deeplab", "smooth", "wide")


@dataclass
class LabelConfig:
    """Masks made by the label factory, for pseudo_label, evaluate and predict."""

    split: str = _choice("train", "train", "val")  # what jobs/pseudo_label labels
    checkpoint: str = "best"  # best, latest or a step
    weights: str = _choice("auto", "auto", "trained", "average")  # auto: the average where train.ema_decay kept one
    unary: str = _choice("cam", "cam", "model")  # what the CRF starts from in jobs/pseudo_label
    restrict: bool = True  # unary model: only classes that the image-level labels name
    unlabelled: str = _choice("background", "background", "skip")  # images without labels
    threshold: float = _number(0.0, 0.0, 1.0)  # constant background beside the CAM in the CRF; 0: cam.threshold
    sharpness: float = _number(1.0, 0.01, 100.0)  # exponent on the CAM before it is normalised to the CRF's unary
    min_probability: float = _number(0.01, 0.0, 1.0)  # model: classes that exceed this nowhere are left out of the CRF
    min_confidence: float = _number(0.0, 0.0, 0.999)  # pixels less certain than this become 255
    compare_model: bool = False  # unary cam: the model looks too, so that the agreement of all three is known
    output: str = ""  # folder or fsspec/pyarrow address of the labels; "": RUN/labels/SPLIT
    soft: bool = False  # KEY.soft.png: probabilities of the classes of each image, 0..255
    confidence: bool = False  # KEY.confidence.png: probability of the winner, 0..255
    png: bool = False  # a folder of palette PNGs beside the label shards (VOC's form)
    coco: bool = False  # a COCO instances JSON with run-length masks beside the label shards
    worst: int = _number(24, 0, 1_000)  # doubtful samples on the page of the quality; 0: no page
    follow: bool = False  # label again whenever label.checkpoint names a newer checkpoint, until training has ended
    follow_interval_s: float = _number(5.0, 0.1, 86_400.0)  # how often to look
    follow_patience_s: float = _number(600.0, 0.0, 1e7)  # how long the training may take to start
    batch_size: int = _number(16, 1, 100_000)  # images of one size class at a time
    batch_pixels: int = _number(400_000, 1, 1_000_000_000)  # and at most so many pixels
    crf_images: int = _number(4, 1, 100_000)  # images that one CRF task takes
    scorers: int = _number(0, 0, 100_000)  # actors that hold the model; 0: as many as the free resources hold
    scorer_cpus: float = _number(0.0, 0.0, 1_024.0)  # CPUs of each; 0: a quarter of one
    scorer_gpus: float = _number(1.0, 0.001, 8.0)  # GPUs of each where train.use_gpu; 0.25: four share one
    crf_cpus: float = _number(0.0, 0.0, 1_024.0)  # CPUs that one CRF task reserves; 0: what a scorer leaves of one
    crf_resource: str = ""  # name of a custom Ray resource that nodes for CRF tasks have; "": any node


@dataclass
class PredictConfig:
    """Masks of a trained model for any images, for jobs/predict; they are seen as `evaluate` says."""

    input: str = ""  # folder of images, or of shards
    output: str = ""  # where the masks go; "": RUN/predict/NAME of the input
    crf: bool = True
    png: bool = True  # a folder of palette PNGs beside the shards


@dataclass
class EvaluateConfig:
    """Inference, for all jobs that label, and scoring (METHOD 1.22, section 5)."""

    parts: list[str] = _listed("seed", "mask", "val")  # and test: an archive for a test server, never scored here
    name: str = ""  # of these settings: masks go to RUN/evaluate/NAME, the result to RUN/evaluate/NAME.json
    input: str = _choice("native", "native", "square", "long_side")  # the size of an image at scale 1
    input_size: int = _number(0, 0, 8192)  # pixels of square or long_side; 0: 320 and 512, the published ones
    merge: str = _choice("mean", "mean", "max")  # of scales and mirrored copies, for logits and CAMs
    crf_presets: list[str] = _listed()  # val is scored with these too, from the same forward passes
    competition: str = _choice("comp6", "comp5", "comp6")  # VOC's test server; comp5: nothing but VOC's data was used
    scales: list[float] = _listed(1.0, 1.2, 1.5)
    cam_scales: list[float] = _listed(1.0)
    flip: bool = True
    limit: int = _number(0, 0, 100_000_000)  # score this many images; 0: all
    thresholds: list[float] = field(
        default_factory=lambda: [0.02, *(round(0.05 * step, 2) for step in range(1, 20))],
    )


@dataclass
class AnalyzeConfig:
    """Spectral analysis of predictions against ground truth, for jobs/analyze (METHOD 3)."""

    prediction: str = (
        ""  # folder of PNGs or arrays (label maps, or logits with background first), or of shards with masks
    )
    truth: str = ""  # likewise; "": shards.val
    output: str = ""  # where the numbers and the page go; "": RUN/analysis/NAME of the predictions
    nu_max: int = _number(32, 1, 2048)  # highest band, cycles per image; resolves grids up to 2 nu_max + 1
    grids: list[int] = _listed(129, 97, 81, 65, 49, 33, 17, 13, 9, 5)  # cells along an axis, for the tables
    max_drop: float = _number(0.05, 0.0, 1.0)  # relative drop of mIoU that the recommended grid may cost
    epsilon: float = _number(0.0, 0.0, 0.999)  # error rate that label maps without logits stand for; 0: their own
    boundary: bool = False  # also boundary IoU, at several times the cost
    pairs_per_part: int = _number(128, 1, 100_000)  # pairs that are committed together
    cpus: float = _number(1.0, 0.01, 1_024.0)  # CPUs that one task reserves


@dataclass
class CorrelateConfig:
    """R_ce against the drop of mIoU that coarser grids bring, for jobs/correlate (METHOD 3)."""

    grids: list[int] = _listed(3, 5, 7, 9, 11, 13)  # cells along the longer side, at most the patch grid's


@dataclass
class BlocksConfig:
    """Block-wise annotation, for jobs/blocks (METHOD 3)."""

    input: str = ""  # folder of PNG masks, or image shards with masks; "": shards.train
    grid: int = _number(33, 1, 4096)  # blocks along each axis, 2 nu_max + 1
    output: str = ""  # where the masks go; "": RUN/blocks/GRID


@dataclass
class WorldConfig:
    """The demo's own world; unused elsewhere."""

    num_train: int = _number(400, 1, 10_000_000)
    num_val: int = _number(100, 1, 10_000_000)
    seed: int = _number(1, 0, 2**31 - 1)


@dataclass
class Config:
    """A whole run."""

    name: str = "run"
    run: str = "runs/run"  # folder of everything that the run writes
    method: str = _choice("dfa", "dfa", "ffr", "dfa+ffr")  # whose losses
    data: DataConfig = field(default_factory=DataConfig)
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    crop: CropConfig = field(default_factory=CropConfig)
    affinity: AffinityConfig = field(default_factory=AffinityConfig)
    frequency: FrequencyConfig = field(default_factory=FrequencyConfig)
    cam: CamConfig = field(default_factory=CamConfig)
    pseudo: PseudoLabelConfig = field(default_factory=PseudoLabelConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    ffr: FfrConfig = field(default_factory=FfrConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    crf: CrfConfig = field(default_factory=CrfConfig)
    label: LabelConfig = field(default_factory=LabelConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    analyze: AnalyzeConfig = field(default_factory=AnalyzeConfig)
    correlate: CorrelateConfig = field(default_factory=CorrelateConfig)
    blocks: BlocksConfig = field(default_factory=BlocksConfig)
    world: WorldConfig = field(default_factory=WorldConfig)
