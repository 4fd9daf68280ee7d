"""The one composition root: Config -> objects. Only this package and jobs know Config."""

from dfa.build.analysis import analysis_output, analysis_pairs, analysis_settings, truncation_costs
from dfa.build.data import CLASSES_NAME, class_set, index, source, source_classes, write_classes
from dfa.build.labelling import (
    checkpoint,
    crf_settings,
    factory_plan,
    follow_plan,
    label_facts,
    label_pass,
    model_pass,
    predict_pass,
    seed_pass,
    views,
)
from dfa.build.model import check_clip, device, encoder, model_description, segmenter, trained_segmenter
from dfa.build.predicting import checkpoint_config, checkpoint_segmenter, load, prediction_input, prediction_output
from dfa.build.provenance import code, machine, versions
from dfa.build.training import loop_plan, pseudo_settings, train_step

__all__ = [
    "CLASSES_NAME",
    "analysis_output",
    "analysis_pairs",
    "analysis_settings",
    "check_clip",
    "checkpoint",
    "checkpoint_config",
    "checkpoint_segmenter",
    "class_set",
    "code",
    "crf_settings",
    "device",
    "encoder",
    "factory_plan",
    "follow_plan",
    "index",
    "label_facts",
    "label_pass",
    "load",
    "loop_plan",
    "machine",
    "model_description",
    "model_pass",
    "predict_pass",
    "prediction_input",
    "prediction_output",
    "pseudo_settings",
    "seed_pass",
    "segmenter",
    "source",
    "source_classes",
    "train_step",
    "trained_segmenter",
    "truncation_costs",
    "versions",
    "views",
    "write_classes",
]
