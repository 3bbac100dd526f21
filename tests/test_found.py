"""Each figure that a chapter says it found is traced to the records that it is read from."""

from __future__ import annotations

import json
import re
import statistics
from typing import Any

import pandas as pd
import pytest

from dfkd_lib import records
from dfkd_lib.locations import book_root, repository_root
from dfkd_lib.reproduction import budgets, papers
from dfkd_lib.reproduction.parameters import chapters

# {chapter: {figure as printed: (runs, metric, parameter or "budget METRIC", what it is multiplied by)}}
ANEW = "2 layers, drawn anew"
MINILM = "3 layers, drawn anew, pretrained teacher"
CUT = "3 layers, pretrained teacher"
C10, C100, LONG = (f"amalgamation/cpu-{name}-" for name in ("cifar10", "cifar100", "b-cifar10"))
SOURCES: dict[str, dict[str, tuple[str, str, float]]] = {
    "amalgamation": {
        "1,400": (C10, "n_steps", 1),
        "5,000": (LONG, "target_steps", 1),
        "1,500": (LONG, "component_steps", 1),
        "82.9": (LONG, "customised/target/part 1", 100),
        "70.7": (LONG, "customised/target/part 2", 100),
        "83.1": (LONG, "customised/source 2/part 1", 100),
        "72.1": (LONG, "customised/source 4/part 2", 100),
        "53.2": (LONG, "customised/target/union", 100),
        "54.5": (LONG, "customised/target in one stage/union", 100),
        "83.3": (LONG, "customised/component 1 of random sources/part 1", 100),
        "82.8": (LONG, "customised/component 1 of all sources/part 1", 100),
        "83.4": (LONG, "customised/component 1/part 1", 100),
        "83.36": (LONG, "customised/component 1/part 1", 100),
        "83.43": (LONG, "customised/component 1 with the source of both tasks/part 1", 100),
        "83.9": (LONG, "customised/source of both tasks/part 1", 100),
        "83.5": (LONG, "customised/component 1 without bridges/part 1", 100),
        "47.5": (C10, "union/KD centred/union", 100),
        "44.9": (C10, "union/A layerwise/union", 100),
        "45.2": (C10, "union/A joint/union", 100),
        "47.0": (C10, "union/C/union", 100),
        "43.6": (C10, "union/KD without norms/union", 100),
        "41.1": (C10, "adaptation/without/union", 100),
        "0.2": (C10, "selection/least ambiguous/part 1 minus selection/source 1/part 1", 100),
        "0.6": (C100, "selection/least ambiguous/part 2 minus selection/source 3/part 2", 100),
        "3.7": (C10, "selection/oracle/part 1 minus selection/source 1/part 1", 100),
        "7.5": (C100, "selection/oracle/part 1 minus selection/source 2/part 1", 100),
        "0.3": (C100, "terms/neither/union minus terms/MMD and reconstruction/union", 100),
        "3.5": (C10, "transfer/C, unseen/union minus transfer/C, another kind/union", 100),
        "6.2": (C100, "layers/A without adaptation/union", 100),
        "17.1": (C100, "layers/A layerwise/union", 100),
        "17.9": (C100, "customised/target/union", 100),
        "18.3": (C100, "union/KD without norms/union", 100),
        "21.2": (C100, "union/KD centred/union", 100),
        "22.6": (C100, "union/raw logits/union", 100),
        "22.7": (C100, "union/centred logits/union", 100),
        "25.5": (C100, "different/C/union", 100),
        "26.5": (C100, "customised/target in one stage/union", 100),
        "26.7": (C10, "layers/A without adaptation/union", 100),
        "27.2": (C100, "customised/component 1 of all sources/part 1", 100),
        "29.3": (C100, "different/raw logits/union", 100),
        "30.3": (C100, "customised/component 1 of random sources/part 1", 100),
        "30.7": (C100, "customised/component 1/part 1", 100),
        "36.6": (C100, "customised/component 1 without bridges/part 1", 100),
        "40.0": (C100, "different/labels/part 2 known", 100),
        "40.7": (C10, "layers/A layerwise/union", 100),
        "46.7": (C10, "union/probabilities/union", 100),
        "47.1": (C10, "union/lowest entropy/union", 100),
        "47.4": (C10, "customised/target/union", 100),
        "47.6": (C100, "different/teachers/part 2 known", 100),
        "49.6": (C10, "union/raw logits/union", 100),
        "53.1": (C10, "customised/target in one stage/union", 100),
        "54.2": (C10, "different/KD raw/union", 100),
        "56.4": (C10, "different/raw logits/union", 100),
        "58.6": (C10, "union/labels/union", 100),
        "59.8": (C100, "union/KD centred/assignment", 100),
        "61.6": (C100, "union/labels/assignment", 100),
        "61.8": (C10, "union/KD centred/assignment", 100),
        "65.2": (C10, "customised/target/part 2", 100),
        "65.5": (C10, "union/KD centred/part 1 known", 100),
        "66.8": (C10, "union/labels/part 1 known", 100),
        "73.0": (C10, "union/KD centred/part 2 known", 100),
        "75.2": (C10, "union/labels/part 2 known", 100),
        "78.6": (C10, "customised/target/part 1", 100),
        "80.0": (C10, "union/labels/assignment", 100),
        "80.5": (C10, "customised/component 1/part 1", 100),
        "82.1": (C10, "different/labels/part 2 known", 100),
        "82.2": (C10, "customised/component 1 without bridges/part 1", 100),
        "84.7": (C10, "customised/source 2/part 1", 100),
        "85.0": (C10, "different/teachers/part 2 known", 100),
        "96.6": (C100, "compression/worst layer/variance kept", 100),
        "300": (C10, "component_steps", 1),
        "500": (C10, "target_steps", 1),
        "700": (C10, "different_steps", 1),
        "20": (C10, "image_size", 1),
    },
    "as-dfd": {
        "95.6": ("as-dfd/gpu-minilm-dbpedia-cut", f"{CUT}/AS-DFD from tokens/accuracy", 100),
        "94.5": ("as-dfd/gpu-minilm-dbpedia-cut", f"{CUT}/modified ZSKD/accuracy", 100),
        "94.2": ("as-dfd/gpu-minilm-dbpedia-cut", f"{CUT}/AS-DFD/accuracy", 100),
        "93.9": ("as-dfd/gpu-minilm-dbpedia-cut", f"{CUT}/no adversary/accuracy", 100),
        "84.8": ("as-dfd/gpu-minilm-dbpedia-cut", f"{CUT}/random text/accuracy", 100),
        "76.6": ("as-dfd/gpu-minilm-dbpedia-cut", f"{CUT}/modified ZSKT/accuracy", 100),
        "21.8": ("as-dfd/gpu-minilm-dbpedia-cut", f"{CUT}/Gaussian/accuracy", 100),
        "97.8": ("as-dfd/gpu-minilm-dbpedia-cut", f"{CUT}/KD original/accuracy", 100),
        "6.7": ("as-dfd/gpu-minilm-dbpedia-cut", f"{CUT}/no distillation/accuracy", 100),
        "98.3": ("as-dfd/gpu-minilm-dbpedia-cut", f"{CUT}/teacher/accuracy", 100),
        "96.9": ("as-dfd/gpu-minilm-dbpedia-cut", f"{CUT}/TF-IDF/accuracy", 100),
        "80.9": ("as-dfd/gpu-minilm-dbpedia-seed", f"{MINILM}/AS-DFD from tokens/accuracy", 100),
        "79.8": ("as-dfd/gpu-minilm-dbpedia-seed", f"{MINILM}/modified ZSKD/accuracy", 100),
        "76.4": ("as-dfd/gpu-minilm-dbpedia-seed", f"{MINILM}/AS-DFD/accuracy", 100),
        "75.9": ("as-dfd/gpu-minilm-dbpedia-seed", f"{MINILM}/no adversary/accuracy", 100),
        "74.2": ("as-dfd/gpu-minilm-dbpedia-seed", f"{MINILM}/random text/accuracy", 100),
        "73.4": ("as-dfd/gpu-minilm-dbpedia-seed", f"{MINILM}/random text, L_ss/accuracy", 100),
        "89.2": ("as-dfd/gpu-minilm-agnews-cut", f"{CUT}/random text, L_ss/accuracy", 100),
        "83.8": ("as-dfd/gpu-minilm-agnews-cut", f"{CUT}/AS-DFD/accuracy", 100),
        "89.9": ("as-dfd/gpu-minilm-agnews-cut", f"{CUT}/KD original/accuracy", 100),
        "25.0": ("as-dfd/gpu-minilm-agnews-cut", f"{CUT}/no distillation/accuracy", 100),
        "79.1": ("as-dfd/gpu-minilm-agnews-cut", f"{CUT}/Gaussian/accuracy", 100),
        "90.8": ("as-dfd/gpu-minilm-agnews-cut", f"{CUT}/teacher/accuracy", 100),
        "88.8": ("as-dfd/gpu-minilm-agnews-cut", f"{CUT}/TF-IDF/accuracy", 100),
        "76.2": ("as-dfd/gpu-minilm-agnews-seed", f"{MINILM}/AS-DFD/accuracy", 100),
        "68.4": ("as-dfd/gpu-minilm-agnews-seed", f"{MINILM}/random text, L_ss/accuracy", 100),
        "55.3": ("as-dfd/gpu-minilm-agnews-seed", f"{MINILM}/random text/accuracy", 100),
        "81.8": ("as-dfd/gpu-minilm-agnews-seed", f"{MINILM}/AS-DFD from tokens/accuracy", 100),
        "78.1": ("as-dfd/gpu-minilm-imdb", f"{MINILM}/random text/accuracy", 100),
        "72.6": ("as-dfd/gpu-minilm-imdb", f"{MINILM}/AS-DFD/accuracy", 100),
        "71.5": ("as-dfd/gpu-minilm-imdb", f"{MINILM}/AS-DFD from tokens/accuracy", 100),
        "82.4": ("as-dfd/gpu-minilm-imdb", f"{MINILM}/KD original/accuracy", 100),
        "10.2": ("as-dfd/gpu-minilm-agnews-seed", f"± {MINILM}/AS-DFD/accuracy", 100),
        "9.5": ("as-dfd/gpu-minilm-agnews-seed", f"± {MINILM}/random text, L_ss/accuracy", 100),
        "26.0": ("as-dfd/gpu-minilm-agnews-seed", f"± {MINILM}/random text/accuracy", 100),
        "0.8": ("as-dfd/gpu-minilm-agnews-seed", f"± {MINILM}/AS-DFD from tokens/accuracy", 100),
        "65.1": ("as-dfd/gpu-minilm-agnews-seed", "ablation/beta 0/accuracy", 100),
        "28": ("as-dfd/gpu-minilm-dbpedia-seed", "crafting/words of the own class/share", 100),
        "24": ("as-dfd/gpu-minilm-agnews-seed", "crafting/words of the own class/share", 100),
        "1.3": ("as-dfd/gpu-minilm-dbpedia-seed", "crafting/words of other classes/share", 100),
        "0.7": ("as-dfd/gpu-minilm-agnews-seed", "crafting/words of other classes/share", 100),
        "82.2": ("as-dfd/cpu-agnews", f"{ANEW}/AS-DFD/accuracy", 100),
        "0.9": ("as-dfd/cpu-agnews", f"± {ANEW}/AS-DFD/accuracy", 100),
        "87.5": ("as-dfd/cpu-agnews", f"{ANEW}/teacher/accuracy", 100),
        "87.1": ("as-dfd/cpu-agnews", f"{ANEW}/random text/accuracy", 100),
        "85.0": ("as-dfd/cpu-agnews", f"{ANEW}/modified ZSKT/accuracy", 100),
        "82.7": ("as-dfd/cpu-agnews", "ablation/beta 0/accuracy", 100),
        "300": ("as-dfd/cpu-agnews", "batches", 5),  # each with four further updates on earlier ones
        "2.1": ("as-dfd/cpu-agnews", "2 layers/random text/accuracy minus 2 layers/AS-DFD/accuracy", 100),
        "9.8": ("as-dfd/cpu-imdb", f"{ANEW}/random text/accuracy minus {ANEW}/AS-DFD/accuracy", 100),
        "2.5": ("as-dfd/cpu-agnews", "± ablation/token start alone/accuracy", 100),
        "4.1": ("as-dfd/cpu-agnews", "± ablation/one step/accuracy", 100),
        "63.1": ("as-dfd/cpu-agnews", f"{ANEW}/Gaussian/accuracy", 100),
        "72.3": ("as-dfd/cpu-imdb", f"{ANEW}/AS-DFD/accuracy", 100),
        "77.3": ("as-dfd/cpu-imdb", f"{ANEW}/AS-DFD from tokens/accuracy", 100),
        "77.6": ("as-dfd/cpu-agnews", "1 layer/no distillation/accuracy", 100),
        "78.5": ("as-dfd/cpu-agnews", f"{ANEW}/no adversary/accuracy", 100),
        "81.7": ("as-dfd/cpu-agnews", "2 layers/no adversary/accuracy", 100),
        "81.9": ("as-dfd/cpu-imdb", f"{ANEW}/teacher/accuracy", 100),
        "82.1": ("as-dfd/cpu-imdb", f"{ANEW}/random text/accuracy", 100),
        "82.3": ("as-dfd/cpu-agnews", "ablation/token start alone/accuracy", 100),
        "85.6": ("as-dfd/cpu-agnews", "2 layers/AS-DFD/accuracy", 100),
        "86.6": ("as-dfd/cpu-agnews", "2 layers/no distillation/accuracy", 100),
        "87.0": ("as-dfd/cpu-agnews", f"{ANEW}/AS-DFD from tokens/accuracy", 100),
        "87.6": ("as-dfd/cpu-agnews", f"{ANEW}/KD original/accuracy", 100),
        "95.2": ("as-dfd/cpu-agnews", f"{ANEW}/random text/agreement", 100),
        "95.9": ("as-dfd/cpu-agnews", f"{ANEW}/AS-DFD from tokens/agreement", 100),
        "32": ("as-dfd/gpu-minilm", "batch_size", 1),
        "1,500": ("as-dfd/cpu-imdb", "test_limit", 1),
    },
    "cmi": {
        "1,200": ("cmi/cpu-mnist", "n_updates", 1),
        "128": ("cmi/cpu-mnist", "batch_size", 1),
        "1.5": ("cmi/cpu-mnist", "budget modes/adversarial/accuracy", 100),
        "92.9": ("cmi/cpu-mnist", "modes/DeepInversion/accuracy", 100),
        "56.6": ("cmi/cpu-mnist", "modes/scratch/accuracy", 100),
        "82.6": ("cmi/cpu-mnist", "ablation/bn/accuracy", 100),
        "39.5": ("cmi/cpu-mnist", "ablation/all/accuracy", 100),
        "98.3": ("cmi/cpu-mnist", "modes/teacher/accuracy", 100),
        "97.6": ("cmi/cpu-mnist", "modes/KD original/accuracy", 100),
        "63.9": ("cmi/cpu-mnist", "modes/adversarial/accuracy", 100),
        "51.6": ("cmi/cpu-mnist", "modes/non-adversarial/accuracy", 100),
        "1,280": ("cmi/cpu-mnist", "modes/DeepInversion/images", 1),
        "1,664": ("cmi/cpu-mnist", "modes/adversarial/images", 1),
        "32.5": ("cmi/cpu-mnist", "ablation/bn+oh/accuracy", 100),
        "36.9": ("cmi/cpu-mnist", "ablation/bn+oh+cr/accuracy", 100),
        "28.1": ("cmi/cpu-mnist", "ablation/bn+oh+adv/accuracy", 100),
        "3.88": ("cmi/cpu-mnist", "ablation/bn/classifier-FID", 1),
        "22.5": ("cmi/cpu-mnist", "ablation/bn+oh/classifier-FID", 1),
        "96.2": ("comparison/cpu-mnist", "comparison/CMI/accuracy", 100),
        "0.267": ("cmi/cpu-mnist", "ablation/bn+oh/mean pairwise distance", 1),
        "0.282": ("cmi/cpu-mnist", "ablation/bn+oh+cr/mean pairwise distance", 1),
        "0.203": ("cmi/cpu-mnist", "ablation/bn+oh/instance discrimination", 1),
        "0.281": ("cmi/cpu-mnist", "ablation/bn+oh+cr/instance discrimination", 1),
        "0.319": ("cmi/cpu-mnist", "diversity/cr=2/instance discrimination", 1),
        "26.7": ("cmi/cpu-mnist", "diversity/cr=2/accuracy", 100),
        "0.057": ("cmi/cpu-mnist", "ablation/bn/coverage", 1),
    },
    "comparison": {
        "97.6": ("comparison/cpu-cpnet-mnist", "comparison/CPNet/accuracy", 100),
        "97.9": ("comparison/cpu-cpnet-mnist", "comparison/NAYER/accuracy", 100),
        "96.7": ("comparison/cpu-cpnet-mnist", "cpnet/coupled body/accuracy", 100),
        "96.8": ("comparison/cpu-cpnet-mnist", "cpnet/+ alignment/accuracy", 100),
        "0.1": ("comparison/cpu-cpnet-mnist", "cpnet/NAYER/accuracy minus cpnet/NAYER + augmentation/accuracy", 100),
        "96.6": ("comparison/cpu-cpnet-mnist", "cpnet/+ augmentation/accuracy", 100),
        "96.9": ("comparison/cpu-cpnet-mnist", "cpnet/+ feature term/accuracy", 100),
        "92.1": ("comparison/cpu-cpnet-seed", "comparison/CPNet/accuracy", 100),
        "93.3": ("comparison/cpu-cpnet-seed", "cpnet/NAYER/accuracy", 100),
        "3.1": ("comparison/cpu-cpnet-seed", "± comparison/CPNet/accuracy", 100),
        "94.8": ("comparison/cpu-cpnet-seed", "cpnet/+ alignment/accuracy", 100),
        "93.0": ("comparison/cpu-cpnet-seed", "cpnet/coupled body/accuracy", 100),
        "1.8": ("comparison/cpu-cpnet-seed", "cpnet/NAYER/accuracy minus cpnet/NAYER + augmentation/accuracy", 100),
        "0.28": ("comparison/cpu-cpnet-mnist", "cost/CPNet/GFLOP per image", 1),
        "1.47": ("comparison/cpu-cpnet-mnist", "cost/NAYER/GFLOP per image", 1),
        "0.24": ("comparison/cpu-cpnet-mnist", "cost/Fast-5/GFLOP per image", 1),
        "1.93": ("comparison/gpu-cifar10-fast-80000", "pilot/fast, absolute/class term", 1),
        "0.62": ("comparison/gpu-cifar10-fast-80000", "pilot/fast, relative/class term", 1),
        "84.05": ("comparison/gpu-cifar10-fast-80000", "comparison/Fast-5/accuracy", 100),
        "75.0": ("comparison/gpu-cifar10-8000", "comparison/Fast-5/accuracy", 100),
        "60,000": ("comparison/gpu-cifar10-8000", "comparison/NAYER/images", 1),
        "82.5": ("comparison/gpu-cifar10-8000", "comparison/NAYER/accuracy", 100),
        "78.5": ("comparison/gpu-cifar10-8000", "comparison/CPNet/accuracy", 100),
        "56.4": ("comparison/gpu-cifar10-8000", "comparison/DFAD/accuracy", 100),
        "55.9": ("comparison/gpu-cifar10-8000", "comparison/DFQ/accuracy", 100),
        "39.7": ("comparison/gpu-cifar10-8000", "comparison/ZSKT/accuracy", 100),
        "29.3": ("comparison/gpu-cifar10-8000", "comparison/DAFL/accuracy", 100),
        "17.1": ("comparison/gpu-cifar10-8000", "comparison/RANDOM/accuracy", 100),
        "86.9": ("comparison/gpu-cifar10-8000", "comparison/KD original/accuracy", 100),
        "50.4": ("comparison/cpu-mnist", "comparison/RANDOM/accuracy", 100),
        "59.6": ("comparison/cpu-mnist", "comparison/RANDOM, batch norm/accuracy", 100),
        "98.8": ("comparison/cpu-mnist", "comparison/KD original, batch norm/accuracy", 100),
        "98.0": ("comparison/cpu-mnist", "comparison/Fast-5/accuracy", 100),
        "97.1": ("comparison/cpu-mnist", "comparison/DFQ/accuracy", 100),
        "96.2": ("comparison/cpu-mnist", "comparison/CMI/accuracy", 100),
        "95.7": ("comparison/cpu-mnist", "comparison/ADI/accuracy", 100),
        "94.1": ("comparison/cpu-mnist", "comparison/ZSKT/accuracy", 100),
        "92.0": ("comparison/cpu-mnist", "comparison/DeepInversion/accuracy", 100),
        "87.7": ("comparison/cpu-mnist", "comparison/DAFL/accuracy", 100),
        "83.8": ("comparison/cpu-mnist", "comparison/DFAD/accuracy", 100),
        "4.8": ("comparison/cpu-mnist", "± comparison/DFAD/accuracy", 100),
        "2.0": ("comparison/cpu-mnist", "± comparison/DAFL/accuracy", 100),
        "3.9": ("comparison/cpu-mnist", "± comparison/DeepInversion/accuracy", 100),
        "1,000": ("comparison/cpu-mnist", "n_updates", 1),
        "128": ("comparison/cpu-mnist", "batch_size_kd", 1),
    },
    "dfad": {
        "99.3": ("dfad/cpu-mnist", "classification/teacher/accuracy", 100),
        "600": ("dfad/cpu-mnist", "n_steps", 1),
        "7.5": ("dfad/cpu-mnist", "budget classification/DFAD/accuracy", 100),
        "97.1": ("dfad/cpu-mnist", "classification/DFAD/accuracy", 100),
        "80.6": ("dfad/cpu-mnist", "classification/RANDOM/accuracy", 100),
        "98.2": ("dfad/cpu-mnist", "classification/DFAD KL/accuracy", 100),
        "800": ("dfad/cpu-camvid", "scene_steps", 1),
        "9.2": ("dfad/cpu-camvid", "segmentation/DFAD log/mean IoU", 100),
        "29.7": ("dfad/cpu-camvid", "segmentation/teacher/mean IoU", 100),
        "97": ("dfad/cpu-mnist-seed0", "classification/DFAD/accuracy", 100),
        "81": ("dfad/cpu-mnist-seed0", "classification/RANDOM/accuracy", 100),
        "99.0": ("dfad/cpu-mnist", "classification/KD original/accuracy", 100),
        "81.8": ("dfad/cpu-mnist", "classification/KD related/accuracy", 100),
        "94.6": ("dfad/cpu-mnist", "classification/KD unrelated/accuracy", 100),
        "83.5": ("dfad/cpu-mnist", "ablation/MAE best lr/accuracy", 100),
        "48.1": ("dfad/cpu-mnist", "k/k=1/accuracy", 100),
        "23.2": ("dfad/cpu-mnist", "± k/k=1/accuracy", 100),
        "7.6": ("dfad/cpu-camvid", "segmentation/RANDOM/mean IoU", 100),
        "28.7": ("dfad/cpu-camvid", "segmentation/KD original/mean IoU", 100),
        "14.5": ("dfad/cpu-camvid", "segmentation/DFAD plain/mean IoU", 100),
    },
    "fast": {
        "1,440": ("fast/cpu-mnist", "n_updates", 1),
        "128": ("fast/cpu-mnist", "batch_size", 1),
        "155": ("fast/cpu-mnist", "speed/CMI-500 over Fast-5/value", 1),
        "172": ("fast/cpu-mnist", "speed/DeepInversion-2000 over Fast-5/value", 1),
        "90.8": ("fast/cpu-mnist", "comparison/Fast-5/accuracy", 100),
        "93.6": ("fast/cpu-mnist", "comparison/Fast-10/accuracy", 100),
        "84.05": ("comparison/gpu-cifar10-fast-80000", "comparison/Fast-5/accuracy", 100),
        "98.3": ("fast/cpu-mnist", "comparison/teacher/accuracy", 100),
        "97.8": ("fast/cpu-mnist", "comparison/KD original/accuracy", 100),
        "94.6": ("fast/cpu-mnist", "comparison/DeepInversion/accuracy", 100),
        "80.4": ("fast/cpu-mnist", "comparison/Fast-2/accuracy", 100),
        "73.8": ("fast/cpu-mnist", "comparison/CMI/accuracy", 100),
        "9.7": ("fast/cpu-mnist", "comparison/RANDOM/accuracy", 100),
        "3.8": ("fast/cpu-mnist", "comparison/Fast-2/synthesis seconds", 1),
        "6.9": ("fast/cpu-mnist", "comparison/Fast-5/synthesis seconds", 1),
        "13.4": ("fast/cpu-mnist", "comparison/Fast-10/synthesis seconds", 1),
        "94.8": ("fast/cpu-mnist", "comparison/ADI/accuracy", 100),
        "47.2": ("fast/cpu-mnist", "comparison/DeepInversion/synthesis seconds", 1),
        "70.6": ("fast/cpu-mnist", "comparison/ADI/synthesis seconds", 1),
        "107": ("fast/cpu-mnist", "comparison/CMI/synthesis seconds", 1),
        "31": ("fast/cpu-mnist", "comparison/Fast-5/total seconds", 1),
        "132": ("fast/cpu-mnist", "comparison/CMI/total seconds", 1),
        "93.3": ("fast/cpu-mnist", "ablation/sequential/accuracy", 100),
        "93.2": ("fast/cpu-mnist", "ablation/rho 0/accuracy", 100),
    },
    "grafting": {
        "94.2": ("grafting/cpu-wrn-cifar10-wrn40_2", "shots/teacher/accuracy", 100),
        "38.2": ("grafting/cpu-wrn-cifar10-wrn40_2", "shots/NetGraft K=1/accuracy", 100),
        "35.4": ("grafting/cpu-wrn-cifar10-wrn40_2", "shots/KD K=1/accuracy", 100),
        "63.0": ("grafting/cpu-wrn-cifar10-wrn40_2", "shots/NetGraft K=5/accuracy", 100),
        "60.6": ("grafting/cpu-wrn-cifar10-wrn40_2", "shots/KD K=5/accuracy", 100),
        "69.7": ("grafting/cpu-wrn-cifar10-wrn40_2", "shots/NetGraft K=10/accuracy", 100),
        "69.0": ("grafting/cpu-wrn-cifar10-wrn40_2", "shots/KD K=10/accuracy", 100),
        "39.6": ("grafting/cpu-wrn-cifar10-wrn40_2", "shots/grafting loss K=1/accuracy", 100),
        "63.3": ("grafting/cpu-wrn-cifar10-wrn40_2", "shots/grafting loss K=5/accuracy", 100),
        "70.3": ("grafting/cpu-wrn-cifar10-wrn40_2", "shots/grafting loss K=10/accuracy", 100),
        "80.2": ("grafting/cpu-wrn-cifar10-wrn40_2", "shots/KD full/accuracy", 100),
        "71.8": ("grafting/cpu-wrn-cifar10-wrn40_2", "ablation/stage 2 alone/accuracy", 100),
        "70.6": ("grafting/cpu-wrn-cifar10-wrn40_2", "ablation/NetGraft/accuracy", 100),
        "66.8": ("grafting/cpu-wrn-cifar10-wrn40_2", "ablation/raw logits/accuracy", 100),
        "66.3": ("grafting/cpu-wrn-cifar10-wrn40_2", "ablation/no augmentation/accuracy", 100),
        "67.1": ("grafting/cpu-wrn-cifar10-wrn40_2", "stages/block groups.2.0/accuracy", 100),
        "2.8": ("grafting/cpu-wrn-cifar10-wrn40_2", "shots/NetGraft K=1/accuracy minus shots/KD K=1/accuracy", 100),
        "2.4": ("grafting/cpu-wrn-cifar10-wrn40_2", "shots/NetGraft K=5/accuracy minus shots/KD K=5/accuracy", 100),
        "0.7": ("grafting/cpu-wrn-cifar10-wrn40_2", "shots/NetGraft K=10/accuracy minus shots/KD K=10/accuracy", 100),
        "4,096": ("grafting/cpu-wrn-cifar10-wrn40_2", "full_views", 1),
        "76.9": ("grafting/cpu-cifar10-vgg16", "shots/NetGraft K=10/accuracy", 100),
        "81.6": ("grafting/cpu-cifar10-vgg16", "shots/teacher/accuracy", 100),
        "39": ("grafting/cpu-cifar10-vgg16", "budget shots/NetGraft K=10/accuracy", 100),
        "77.4": ("grafting/cpu-cifar10-vgg16", "shots/KD K=10/accuracy", 100),
        "67.7": ("grafting/cpu-cifar10-vgg16", "shots/labels K=10/accuracy", 100),
        "57.5": ("grafting/cpu-cifar10-vgg16", "shots/NetGraft K=1/accuracy", 100),
        "59.8": ("grafting/cpu-cifar10-vgg16", "shots/grafting loss K=1/accuracy", 100),
        "78.6": ("grafting/cpu-cifar10-vgg16", "shots/NetGraft K=50/accuracy", 100),
        "79.4": ("grafting/cpu-cifar10-vgg16", "shots/grafting loss K=50/accuracy", 100),
        "18.2": ("grafting/cpu-cifar10-vgg16", "seen/few-shot teacher/accuracy", 100),
        "63.7": ("grafting/cpu-cifar10-vgg16", "ablation/no stage 2/accuracy", 100),
        "74.1": ("grafting/cpu-cifar10-vgg16", "ablation/no augmentation/accuracy", 100),
        "76.7": ("grafting/cpu-cifar10-vgg16", "seen/unseen images/accuracy", 100),
        "50.8": ("grafting/cpu-cifar10-resnet18", "shots/NetGraft K=50/accuracy", 100),
        "57.1": ("grafting/cpu-cifar10-resnet18", "shots/KD K=50/accuracy", 100),
        "61.3": ("grafting/cpu-cifar10-resnet18", "shots/KD full/accuracy", 100),
        "81.2": ("grafting/cpu-cifar10-resnet18", "shots/teacher/accuracy", 100),
    },
    "impression": {
        "90.9": ("impression/gpu-cifar10", "networks/template/accuracy", 100),
        "90.4": ("impression/gpu-cifar10", "networks/verifier/accuracy", 100),
        "84.3": ("impression/cpu-cifar10", "networks/verifier/accuracy", 100),
        "200": ("impression/gpu-cifar10", "per_class", 10),
        "20": ("impression/cpu-cifar10", "per_class", 10),
        "600": ("impression/gpu-cifar10", "steps", 1),
        "500": ("impression/gpu-cifar10", "relation_per_class", 1),
        "64": ("impression/gpu-cifar10", "per_pair", 1),
        "384": ("impression/gpu-cifar10", "per_pair", 6),
        "50": ("impression/gpu-cifar10", "synthesis_seeds", 10),
        "44.7": ("impression/gpu-cifar10", "psnr/trained full stage 1/value", 1),
        "19.9": ("impression/gpu-cifar10", "psnr/trained full stage 2/value", 1),
        "10.7": ("impression/gpu-cifar10", "psnr/trained full embedding/value", 1),
        "20.6": ("impression/gpu-cifar10", "psnr/trained full all/value", 1),
        "13.2": ("impression/gpu-cifar10", "psnr/random full embedding/value", 1),
        "56.1": ("impression/gpu-cifar10", "psnr/random full all/value", 1),
        "12.6": ("impression/gpu-cifar10", "psnr/trained stat stage 1/value", 1),
        "14.7": ("impression/gpu-cifar10", "psnr/random stat stage 3/value", 1),
        "12.7": ("impression/gpu-cifar10", "psnr/mean image/value", 1),
        "17.0": ("impression/gpu-cifar10", "decoding/random full embedding/verifier", 100),
        "0.01": ("impression/gpu-cifar10", "depth/smallest fall/value", 1),
        "0.0004": ("impression/gpu-cifar10", "residual/trained full embedding/value", 1),
        "0.036": ("impression/gpu-cifar10", "residual/trained full stage 3/value", 1),
        "0.010": ("impression/gpu-cifar10", "residual/trained full all/value", 1),
        "0.005": ("impression/gpu-cifar10", "residual/random full stage 3/value", 1),
        "94.5": ("impression/gpu-cifar10", "decoding/trained full stage 2/verifier", 100),
        "94.0": ("impression/gpu-cifar10", "decoding/trained full all/verifier", 100),
        "50.5": ("impression/gpu-cifar10", "decoding/trained full stage 3/verifier", 100),
        "32.5": ("impression/gpu-cifar10", "decoding/trained full embedding/verifier", 100),
        "27.5": ("impression/gpu-cifar10", "decoding/random full stage 3/verifier", 100),
        "15.5": (
            "impression/gpu-cifar10",
            "decoding/trained full embedding/verifier minus decoding/random full embedding/verifier",
            100,
        ),
        "76": ("impression/gpu-cifar10", "decoding/trained stat all/verifier", 100),
        "35": ("impression/gpu-cifar10", "decoding/random stat all/verifier", 100),
        "71": ("impression/gpu-cifar10", "decoding/trained grid-1 all/verifier", 100),
        "11.3": ("impression/cpu-cifar10", "psnr/trained full stage 3/value", 1),
        "12.1": ("impression/cpu-cifar10", "psnr/mean image/value", 1),
        "14.2": ("impression/cpu-cifar10", "psnr/random full all/value", 1),
        "17.3": ("impression/cpu-cifar10", "psnr/trained full stage 1/value", 1),
        "18.3": ("impression/cpu-cifar10", "psnr/trained full all/value", 1),
        "75": ("impression/cpu-cifar10", "decoding/trained stat all/verifier", 100),
        "88": ("impression/gpu-cifar10", "relations/trained embedding/precision", 100),
        "10": ("impression/gpu-cifar10", "relations/chance/precision", 100),
        "34.5": ("impression/gpu-cifar10", "relations/trained stage 1/precision", 100),
        "87.3": ("impression/gpu-cifar10", "relations/trained stage 3/precision", 100),
        "87.9": ("impression/gpu-cifar10", "relations/trained embedding/precision", 100),
        "1.5": (
            "impression/gpu-cifar10",
            "relations/trained embedding/precision minus relations/trained all/precision",
            100,
        ),
        "24.5": ("impression/gpu-cifar10", "relations/random stage 1/precision", 100),
        "27.9": ("impression/gpu-cifar10", "relations/random stage 3/precision", 100),
        "29.0": ("impression/gpu-cifar10", "relations/pixels/precision", 100),
        "25.5": ("impression/cpu-cifar10", "relations/trained stage 1/precision", 100),
        "90.2": ("impression/cpu-cifar10", "relations/trained embedding/precision", 100),
        "73.4": ("impression/gpu-cifar10", "unseen/trained embedding/precision", 100),
        "77.1": ("impression/gpu-cifar10", "unseen/trained stage 2/precision", 100),
        "79.7": ("impression/gpu-cifar10", "unseen/trained all/precision", 100),
        "68.6": ("impression/gpu-cifar10", "unseen/random embedding/precision", 100),
        "4.8": (
            "impression/gpu-cifar10",
            "unseen/trained embedding/precision minus unseen/random embedding/precision",
            100,
        ),
        "67.6": ("impression/gpu-cifar10", "unseen/pixels/precision", 100),
        "49.9": ("impression/gpu-cifar10", "unseen/chance/precision", 100),
        "71.8": ("impression/cpu-cifar10", "unseen/trained embedding/precision", 100),
        "74.7": ("impression/cpu-cifar10", "unseen/trained all/precision", 100),
        "2.8": (
            "impression/cpu-cifar10",
            "unseen/trained embedding/precision minus unseen/random embedding/precision",
            100,
        ),
        "61.0": ("impression/cpu-cifar10", "unseen/pixels/precision", 100),
        "49.7": ("impression/cpu-cifar10", "unseen/chance/precision", 100),
        "62": ("impression/gpu-cifar10", "translation/alpha 1/verifier", 100),
        "96": ("impression/gpu-cifar10", "translation/alpha 3/verifier", 100),
        "61.7": ("impression/gpu-cifar10", "translation/alpha 1/verifier", 100),
        "96.4": ("impression/gpu-cifar10", "translation/alpha 3/verifier", 100),
        "19.5": ("impression/gpu-cifar10", "psnr/translation alpha 0.5/value", 1),
        "19.2": ("impression/gpu-cifar10", "psnr/translation alpha 1/value", 1),
        "17.4": ("impression/gpu-cifar10", "psnr/translation alpha 3/value", 1),
        "9.7": ("impression/gpu-cifar10", "psnr/unrelated image of the target class/value", 1),
        "55.6": ("impression/cpu-cifar10", "translation/alpha 1/verifier", 100),
        "91.7": ("impression/cpu-cifar10", "translation/alpha 3/verifier", 100),
        "86.0": ("impression/gpu-cifar10", "synthesis/stat/verifier", 100),
        "34.0": ("impression/gpu-cifar10", "synthesis/full/verifier", 100),
        "70": ("impression/cpu-cifar10", "synthesis/full/verifier", 100),
        "30": ("impression/cpu-cifar10", "synthesis/class mean image/verifier", 100),
        "20.0": ("impression/gpu-cifar10", "synthesis/class mean image/verifier", 100),
        "0.52": ("impression/gpu-cifar10", "residual/synthesis full/value", 1),
        "0.004": ("impression/gpu-cifar10", "residual/synthesis stat/value", 1),
        "7.2": ("impression/gpu-cifar10", "memory/noise over training images/value", 1),
        "47.7": ("impression/cpu-cifar10", "memory/noise over training images/value", 1),
    },
    "mosaickd": {
        "1,000": ("mosaickd/cpu-cifar10", "n_steps", 1),
        "0.64": ("mosaickd/cpu-cifar10", "budget comparison/MosaicKD/accuracy", 100),
        "57.6": ("mosaickd/cpu-cifar10", "comparison/MosaicKD/accuracy", 100),
        "70.5": ("mosaickd/cpu-cifar10", "comparison/KD original/accuracy", 100),
        "39.3": ("mosaickd/cpu-cifar10", "comparison/data-free/accuracy", 100),
        "46.6": ("mosaickd/cpu-cifar10", "comparison/KD OOD/accuracy", 100),
        "43.3": ("mosaickd/cpu-cifar10", "comparison/no D/accuracy", 100),
        "58.9": ("mosaickd/cpu-cifar10", "comparison/full-image D/accuracy", 100),
        "54.2": ("mosaickd/cpu-cifar10", "ablation/patch4/accuracy", 100),
        "31.9": ("mosaickd/cpu-cifar10", "far/KD OOD/accuracy", 100),
        "37.0": ("mosaickd/cpu-cifar10", "far/MosaicKD/accuracy", 100),
        "250": ("mosaickd/cpu-pair-cifar100", "n_steps", 1),
        "32": ("mosaickd/cpu-pair-cifar100", "batch_size", 1),
        "0.08": ("mosaickd/cpu-pair-cifar100", "budget comparison/MosaicKD/accuracy", 100),
        "6.1": ("mosaickd/cpu-pair-cifar100", "comparison/KD OOD/accuracy", 100),
        "4.1": ("mosaickd/cpu-pair-cifar100", "comparison/MosaicKD/accuracy", 100),
        "1.6": ("mosaickd/cpu-pair-cifar100", "comparison/data-free/accuracy", 100),
        "18.4": ("mosaickd/cpu-pair-cifar100", "comparison/KD original/accuracy", 100),
        "69.0": ("mosaickd/cpu-pair-cifar100", "selection/share at hand/value", 100),
        "57.0": ("mosaickd/cpu-cifar10", "selection/share at hand/value", 100),
        "25.8": ("mosaickd/cpu-camvid", "segmentation/MosaicKD/mean IoU", 100),
        "21.8": ("mosaickd/cpu-camvid", "segmentation/KD OOD/mean IoU", 100),
        "12.2": ("mosaickd/cpu-camvid", "segmentation/data-free/mean IoU", 100),
    },
    "qfsl": {
        "98.4": ("qfsl/cpu-cifar100", "gzsl/inductive #*/to source classes", 100),
        "1.4": ("qfsl/cpu-cifar100", "gzsl/inductive #*/H", 100),
        "17.5": ("qfsl/cpu-cifar100", "gzsl/QFSL #*/H", 100),
        "13.6": ("qfsl/cpu-cifar100", "gzsl/pseudo-labels #*/H", 100),
        "23.4": ("qfsl/cpu-cifar100", "gzsl/supervised bound #*/H", 100),
        "15.5": ("qfsl/cpu-cifar100", "gzsl/calibrated stacking #*/H", 100),
        "29.4": ("qfsl/cpu-cifar100", "gzsl awa2/QFSL #*/H", 100),
        "24.5": ("qfsl/cpu-cifar100", "gzsl awa2/calibrated stacking #*/H", 100),
        "30.6": ("qfsl/cpu-cifar100", "gzsl/QFSL #*/conventional", 100),
        "31.0": ("qfsl/cpu-cifar100", "gzsl/inductive #*/conventional", 100),
        "13.8": ("qfsl/cpu-cifar100", "gzsl/QFSL #*/MCA_s", 100),
        "26.8": ("qfsl/cpu-cifar100", "gzsl/inductive #*/MCA_s", 100),
        "24.8": ("qfsl/cpu-cifar100", "gzsl/QFSL #*/MCA_t", 100),
        "11.7": ("qfsl/cpu-cifar100", "gzsl/calibrated stacking #*/MCA_s", 100),
        "17.9": ("qfsl/cpu-cifar100", "gzsl/calibrated stacking, best possible #*/H", 100),
        "23.8": ("qfsl/cpu-cifar100", "gzsl animals60/QFSL #*/H", 100),
        "5.7": ("qfsl/cpu-cifar100", "semantics/super20, QFSL/H", 100),
        "64.4": ("qfsl/cpu-cifar100", "gzsl/supervised bound #*/to source classes", 100),
        "12.1": ("qfsl/cpu-cifar100", "pool/50% source images/MCA_s", 100),
    },
    "selective-zero-shot": {
        "0.707": ("selective-zero-shot/cpu-cifar100", "confidence/defined and residual, chosen #*/AURC", 1),
        "0.701": ("selective-zero-shot/cpu-cifar100", "confidence/max probability, T chosen #*/AURC", 1),
        "0.774": ("selective-zero-shot/cpu-cifar100", "confidence/random #*/AURC", 1),
        "0.444": ("selective-zero-shot/cpu-cifar100", "confidence/oracle #*/AURC", 1),
        "0.734": ("selective-zero-shot/cpu-cifar100", "confidence/defined and residual T=1, eta=1 #*/AURC", 1),
        "0.694": ("selective-zero-shot/cpu-cifar100", "confidence/max probability T=1 #*/AURC", 1),
        "0.430": ("selective-zero-shot/cpu-cifar100", "confidence awa2/defined and residual, chosen #*/AURC", 1),
        "0.419": ("selective-zero-shot/cpu-cifar100", "confidence awa2/max probability, T chosen #*/AURC", 1),
        "0.542": ("selective-zero-shot/cpu-cifar100", "confidence animals60/defined and residual, chosen #*/AURC", 1),
        "0.565": ("selective-zero-shot/cpu-cifar100", "confidence animals60/max probability, T chosen #*/AURC", 1),
        "0.726": ("selective-zero-shot/cpu-cifar100", "confidence/margin #*/AURC", 1),
        "0.699": ("selective-zero-shot/cpu-cifar100", "confidence/entropy #*/AURC", 1),
        "0.706": ("selective-zero-shot/cpu-cifar100", "confidence/max probability T=16 #*/AURC", 1),
        "0.769": ("selective-zero-shot/cpu-cifar100", "confidence/residual alone #*/AURC", 1),
        "63.3": ("selective-zero-shot/cpu-cifar100", "confidence/defined and residual, chosen #*/risk at 0.1", 100),
        "77.8": ("selective-zero-shot/cpu-cifar100", "confidence/defined and residual, chosen #*/risk at 1", 100),
        "0.691": ("selective-zero-shot/cpu-cifar100", "vocabulary/12 attributes #*/without residuals", 1),
        "0.581": ("selective-zero-shot/cpu-cifar100", "vocabulary/60 attributes #*/without residuals", 1),
        "0.558": ("selective-zero-shot/cpu-cifar100", "confidence animals60/residual alone #*/AURC", 1),
        "0.631": ("selective-zero-shot/cpu-cifar100", "confidence animals60/random #*/AURC", 1),
        "0.518": ("selective-zero-shot/cpu-cifar100", "confidence awa2/residual alone #*/AURC", 1),
        "0.548": ("selective-zero-shot/cpu-cifar100", "confidence awa2/random #*/AURC", 1),
    },
    "one-stage": {
        "2.8": ("one-stage/cpu-digits", "gan/non-saturating one-stage/Frechet distance", 1),
        "2.7": ("one-stage/cpu-digits", "gan/non-saturating two-stage/Frechet distance", 1),
        "10.2": ("one-stage/cpu-digits", "gan/WGAN one-stage/Frechet distance", 1),
        "7.2": ("one-stage/cpu-digits", "gan/WGAN two-stage/Frechet distance", 1),
        "13.9": ("one-stage/cpu-digits", "gan/saturating one-stage/Frechet distance", 1),
        "1.8": ("one-stage/cpu-digits", "gan/saturating two-stage/Frechet distance", 1),
        "408": ("one-stage/cpu-mnist", "gan/non-saturating one-stage/Frechet distance", 1),
        "237": ("one-stage/cpu-mnist", "gan/non-saturating two-stage/Frechet distance", 1),
        "438": ("one-stage/cpu-mnist", "gan/WGAN one-stage/Frechet distance", 1),
        "326": ("one-stage/cpu-mnist", "gan/WGAN two-stage/Frechet distance", 1),
        "94.0": ("one-stage/cpu-mnist", "distillation/one-stage KL best rate/accuracy", 100),
        "94.5": ("one-stage/cpu-mnist", "distillation/two-stage k=1 KL best rate/accuracy", 100),
        "51": ("one-stage/cpu-mnist", "distillation/one-stage KL best rate/target seconds", 1),
        "71": ("one-stage/cpu-mnist", "distillation/two-stage k=1 KL best rate/target seconds", 1),
        "43": ("one-stage/cpu-mnist", "distillation/two-stage k=5 KL/target seconds", 1),
        "5.5": ("one-stage/cpu-digits", "gan/saturating one-stage, D slower/Frechet distance", 1),
        "3.0": ("one-stage/cpu-digits", "gan/non-saturating one-stage, D slower/Frechet distance", 1),
        "328": ("one-stage/cpu-mnist", "gan/non-saturating one-stage, D slower/Frechet distance", 1),
        "19.9": ("one-stage/cpu-digits", "gan/WGAN one-stage, D slower/Frechet distance", 1),
        "586": ("one-stage/cpu-mnist", "gan/WGAN one-stage, D slower/Frechet distance", 1),
        "94.2": ("one-stage/cpu-digits", "distillation/one-stage KL best rate/accuracy", 100),
        "96.0": ("one-stage/cpu-digits", "distillation/two-stage k=1 KL best rate/accuracy", 100),
        "93.7": ("one-stage/cpu-digits", "distillation/two-stage k=5 KL/accuracy", 100),
        "91.3": ("one-stage/cpu-mnist", "distillation/two-stage k=5 KL/accuracy", 100),
        "89.2": ("one-stage/cpu-digits", "distillation/one-stage MAE best rate/accuracy", 100),
        "91.5": ("one-stage/cpu-digits", "distillation/two-stage k=1 MAE best rate/accuracy", 100),
        "88.8": ("one-stage/cpu-digits", "distillation/two-stage k=5 MAE/accuracy", 100),
        "70.7": ("one-stage/cpu-mnist", "distillation/one-stage MAE best rate/accuracy", 100),
        "67.7": ("one-stage/cpu-mnist", "distillation/two-stage k=1 MAE best rate/accuracy", 100),
        "64.9": ("one-stage/cpu-mnist", "distillation/two-stage k=5 MAE/accuracy", 100),
        "555": ("one-stage/cpu-mnist", "gan/saturating two-stage/Frechet distance", 1),
        "767": ("one-stage/cpu-mnist", "gan/saturating two-stage/Frechet distance at the start", 1),
    },
    "attribution-maps": {
        "0.49": ("attribution-maps/cpu-mnist", "Spearman/gradient x input/value", 1),
        "0.93": ("attribution-maps/cpu-mnist", "Spearman/ceiling/value", 1),
        "0.66": ("attribution-maps/cpu-mnist", "Spearman/linear CKA/value", 1),
        "0.62": ("attribution-maps/cpu-mnist", "Spearman/RSA/value", 1),
        "0.19": ("attribution-maps/cpu-mnist", "Spearman/saliency/value", 1),
        "0.26": ("attribution-maps/cpu-mnist", "probes/another data set/value", 1),
        "43": ("attribution-maps/cpu-mnist", "precision/gradient x input/value", 100),
        "36": ("attribution-maps/cpu-mnist", "precision/saliency/value", 100),
        "73": ("attribution-maps/cpu-mnist", "precision/linear CKA/value", 100),
        "25": ("attribution-maps/cpu-mnist", "precision/chance/value", 100),
        "0.003": ("attribution-maps/cpu-mnist", "affinity/largest change by epsilon-LRP/value", 1),
        "0.45": ("attribution-maps/cpu-mnist", "groups/low-level within/value", 1),
        "0.38": ("attribution-maps/cpu-mnist", "groups/low-level to semantic/value", 1),
        "0.46": ("attribution-maps/cpu-mnist", "controls/second seed/value", 1),
        "0.54": ("attribution-maps/cpu-mnist", "controls/nearest other task/value", 1),
        "0.34": ("attribution-maps/cpu-mnist", "probes/noise/value", 1),
    },
    "depara": {
        "0.65": ("depara/cpu-mnist", "Spearman/edges/value", 1),
        "0.49": ("depara/cpu-mnist", "Spearman/nodes/value", 1),
        "0.55": ("depara/cpu-mnist", "Spearman/DEPARA/value", 1),
        "0.66": ("depara/cpu-mnist", "Spearman/DEPARA, lambda left out/value", 1),
        "0.62": ("depara/cpu-mnist", "Spearman/RSA/value", 1),
        "1.0": ("depara/cpu-mnist", "selection/mean regret/value", 100),
        "9.8": ("depara/cpu-mnist", "selection/at random/value", 100),
        "10.5": ("depara/cpu-mnist", "selection/always last/value", 100),
        "0.5": ("depara/cpu-mnist", "selection/always first/value", 100),
        "0.6": ("depara/cpu-mnist", "selection/best layer over scratch/value", 100),
        "50": ("depara/cpu-mnist", "precision/DEPARA/value", 100),
        "44": ("depara/cpu-mnist", "precision/nodes/value", 100),
        "73": ("depara/cpu-mnist", "precision/edges/value", 100),
        "25": ("depara/cpu-mnist", "precision/chance/value", 100),
        "0.15": ("depara/cpu-mnist", "regret/nodes/value", 1),
        "0.14": ("depara/cpu-mnist", "regret/DEPARA/value", 1),
        "0.04": ("depara/cpu-mnist", "regret/edges/value", 1),
        "0.67": ("depara/cpu-mnist", "graphs/second seed/value", 1),
        "0.70": ("depara/cpu-mnist", "graphs/nearest other task/value", 1),
        "5,000": ("depara/cpu-mnist", "source_images", 1),
        "300": ("depara/cpu-mnist", "source_steps", 1),
    },
    "teacher": {
        "97.0": ("teacher/cpu-mnist", "teacher/1 epochs/accuracy", 100),
        "98.3": ("teacher/cpu-mnist", "teacher/4 epochs/accuracy", 100),
        "99.0": ("teacher/cpu-mnist", "teacher/20 epochs/accuracy", 100),
        "86.0": ("teacher/cpu-mnist", "1 epochs/CMI/accuracy", 100),
        "40.5": ("teacher/cpu-mnist", "4 epochs/CMI/accuracy", 100),
        "59.9": ("teacher/cpu-mnist", "20 epochs/CMI/accuracy", 100),
        "91.8": ("teacher/cpu-mnist", "1 epochs/NAYER/accuracy", 100),
        "93.7": ("teacher/cpu-mnist", "4 epochs/NAYER/accuracy", 100),
        "89.1": ("teacher/cpu-mnist", "20 epochs/NAYER/accuracy", 100),
        "8.9": ("teacher/cpu-mnist", "20 epochs/ZSKT/accuracy", 100),
        "9.7": ("teacher/cpu-mnist", "20 epochs/DAFL/accuracy", 100),
        "92.0": ("teacher/cpu-cifar10", "teacher/18 epochs/accuracy", 100),
        "59.3": ("teacher/cpu-cifar10", "teacher/1 epochs/accuracy", 100),
        "43.8": ("teacher/cpu-cifar10", "18 epochs/NAYER/accuracy", 100),
        "18.9": ("teacher/cpu-cifar10", "1 epochs/NAYER/accuracy", 100),
        "13.5": ("teacher/cpu-cifar10", "18 epochs/DeepInversion/accuracy", 100),
        "400": ("teacher/cpu-", "n_updates", 1),
        "0.5": ("teacher/cpu-", "n_updates", 100 / 80_000),  # of the toolbox's
    },
}
# What is no result: a published figure, the steps of published methods, a weight, what a band of a picture covers.
GIVEN = {
    "as-dfd": {"14"},
    "cmi": {"2"},
    "comparison": {
        "0.6",
        "66",
        "91.12",
        "64",
        "512",
        "88.90",
        "200",
        "90",
        "400",
        "600",
        "83",
        "20",
        "67",
        "85",
        "93",
        "95",
        "92",
        "81",
    },
    "attribution-maps": {"14", "17", "28"},
    "depara": {"1,000"},
    "qfsl": {"20"},
    "selective-zero-shot": {"1"},
    "one-stage": {"1,312", "1", "5", "400"},
    "fast": {"88.90", "500", "2,000"},
    "grafting": {"95", "92.83", "840"},
    "impression": {"1", "3", "100"},
}
TOLD = r"\*\*What (was found|the (table|figure)s? says?)\.\*\*"
NAMES = r"CIFAR-\d+|WRN-\d+-\d+|LeNet-\d+|VGG\d+|Fast-\d+|\d+x\d+|seed \d|\{ref\}`[^`]*`"
ORIGIN = r"paper|author|publish|script|repositor|toolbox|printed|% interval"
MEASURED = r"(?<![\w.@])\d[\d,]*(?:\.\d+)?(?= ?%)|(?<![\w.@/])\d+\.\d+(?![\w.])"
UNREAD = r"```.*?```|\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|\{[a-z]+\}`[^`]*`|\]\([^)]*\)"
NUMBER = r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?"


def told(chapter: str) -> str:
    """What a chapter says that it found: its head, with the words of the figure there, and its readings of tables."""
    lines = [line for text in sections(chapter) if re.search(TOLD, text) for line in text.splitlines()]
    return re.sub(NAMES, "", "\n".join(line for line in lines if not line.startswith((":name:", ":width:", "```"))))


def figure(source: tuple[str, str, float], found: list[dict[str, Any]]) -> float:
    """The figure that a source names: the mean over its runs, their standard deviation after "±", or a difference."""
    runs, key, factor = source
    chosen = [record for record in found if f"{record['chapter']}/{record['run']}".startswith(runs)]
    assert chosen, runs
    if key.startswith("budget "):
        experiment = key.removeprefix("budget ").split("/")[0]
        known = [b for b in papers.paper(chosen[0]["chapter"]).budgets if b.chapter == chosen[0]["chapter"]]
        budget = next(b for b in known if not b.experiments or experiment in b.experiments)
        share = budgets.share(budget, chosen[0])
        assert share is not None
        return factor * share
    if " minus " in key:
        larger, smaller = key.split(" minus ")
        return figure((runs, larger, factor), found) - figure((runs, smaller, factor), found)
    pattern = re.escape(key.removeprefix("± ")).replace(r"\#\*", r"#\d+")  # of all repeats
    known_of = (record["metrics" if "/" in key else "parameters"] for record in chosen)
    of = [value for values in known_of for name, value in values.items() if re.fullmatch(pattern, name)]
    return factor * (statistics.stdev(of) if key.startswith("±") else statistics.fmean(of))


def sections(chapter: str) -> list[str]:
    """The prose of a chapter, cut at its headings."""
    cells = json.loads((book_root() / "chapters" / f"{chapter}.ipynb").read_text(encoding="utf-8"))["cells"]
    return [
        text
        for cell in cells
        if cell["cell_type"] == "markdown"
        for text in re.split(r"\n(?=#+ )", "".join(cell["source"]))
    ]


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return records.committed()


@pytest.mark.parametrize("chapter", chapters())
def test_every_figure_that_a_chapter_found_has_its_record(chapter: str, found: list[dict[str, Any]]) -> None:
    printed = set(re.findall(NUMBER, told(chapter)))
    larger = any(record["chapter"] == chapter and records.scale(record) != "smoke" for record in found)
    assert printed or not larger, "a chapter opens with what was found"
    sources = SOURCES.get(chapter, {})
    assert printed == sources.keys() | GIVEN.get(chapter, set())
    for text, source in sources.items():
        digits = len(text.partition(".")[2])
        assert f"{figure(source, found):,.{digits}f}" == text, source


def test_figures_of_the_search_and_of_the_long_curve_are_in_their_files(found: list[dict[str, Any]]) -> None:
    root = repository_root()
    assert root
    trials = json.loads((root / "benchmarks" / "search-mnist.json").read_text(encoding="utf-8"))["trials"]
    held_out = {(t["method"], t["trial"]): 100 * t["held-out accuracy"] for t in trials}
    assert [f"{held_out['zskt', n]:.0f}" for n in (1, 2)] == ["64", "95"]
    assert [f"{held_out['deepinversion', n]:.0f}" for n in (2, 3, 6)] == ["67", "85", "93"]
    assert [f"{held_out['dfad', n]:.0f}" for n in (7, 2)] == ["92", "81"]
    (run,) = (r for r in found if r["run"].startswith("gpu-cifar10-fast-80000"))
    history = pd.read_csv(run["folder"] / "history.csv").set_index("student updates")
    assert f"{100 * history.accuracy[8_000]:.0f}" == "66", "after a tenth of the updates"


def unfounded(prose: str) -> list[str]:
    """The sentences with a percentage or a decimal number that do not say whose it is."""
    sentences = re.split(r"(?<=\.)\s+", re.sub(UNREAD, "", prose, flags=re.DOTALL))
    return [s for s in sentences if re.search(MEASURED, s) and not re.search(ORIGIN, s)]


@pytest.mark.parametrize("chapter", chapters())
def test_any_other_figure_in_prose_says_whose_it_is(chapter: str) -> None:
    others = [text for text in sections(chapter) if not re.search(TOLD, text)]
    left = [
        s for text in others for s in unfounded(text) if not set(re.findall(MEASURED, s)) <= GIVEN.get(chapter, set())
    ]
    assert not left


def test_a_figure_of_no_one_is_noticed() -> None:
    assert unfounded("It reaches 91.2 % here. The paper prints 90.7.") == ["It reaches 91.2 % here."]
    assert not unfounded("See {eq}`a` and $0.5 x$, at `-p lr 0.1`, in 3 of 10 runs.")


def test_a_published_figure_is_that_of_the_card() -> None:
    (mean,) = papers.published("fast", "comparison", "cifar10").set_index("method").loc[["Fast-5"], "mean"]
    assert f"{100 * mean:.2f}" == "88.90"
