"""Examples of every command, as its help prints them below its options, and its exit codes (torch-free).

A test runs them all, or says what it runs in their place and why; their plans fit the cluster that they name.
"""

from __future__ import annotations

PAPER = "tp=4,cp=2,dp_shard=768,recompute=o:lse"  # 20 of 84.9 GB; keeping more than o and lse everywhere does not fit

CHECKED = "0 it holds; 1 it does not; 2 wrong input, with a line that says how to mend it."
STARTED = "0 done; 1 a bug; 2 wrong input or data; 128 + n when signal n stopped it and its state is saved."
DONE = "0 done; 2 wrong input, with a line that says how to mend it."
CODES: dict[str, str] = {
    **dict.fromkeys(("verify", "doctor", "replay", "lint"), CHECKED),
    **dict.fromkeys(("train", "tae train", "stages", "launch", "sample", "upsample", "profile"), STARTED),
}

EXAMPLES: dict[str, tuple[str, ...]] = {
    "train": (
        "cinemesh train configs/quickstart.yaml --nproc 2",
        "cinemesh train configs/quickstart.yaml --nproc 2 --plan cp=2,dtype=float32 --set logging.directory=runs/cp2",
        "torchrun --nproc-per-node 2 -m cinemesh.launch.train configs/quickstart.yaml",
        "cinemesh train configs/quickstart.yaml --nproc 2 --dry-run --set cluster=local-cpu",
    ),
    "doctor": (
        "cinemesh doctor",
        "cinemesh doctor --json --per-node 2 --device cpu",
    ),
    "stages": ("cinemesh stages configs/chain.yaml --nproc 2",),
    "launch": (
        "cinemesh launch slurm configs/gpu-8.yaml --spares 1 --time 12:00:00 --out run.sbatch",
        "cinemesh launch slurm configs/chain.yaml --per-node 2 --out chain.sbatch",
        "cinemesh launch kubernetes configs/gpu-8.yaml --image registry/cinemesh:1 --claim work",
        "cinemesh launch kubernetes configs/gpu-8.yaml --image registry/cinemesh:1 --kind JobSet --out run.yaml",
        "cinemesh launch local configs/quickstart.yaml",
    ),
    "sample": (
        'cinemesh sample configs/quickstart.yaml --prompt "Traffic crosses a square." --out clip.mp4',
        'cinemesh sample configs/quickstart.yaml --prompt "A grey rabbit." --seed 3 --guidance 1.5',
        "cinemesh sample configs/quickstart.yaml --prompts prompts.yaml --out clips --solver midpoint",
        'cinemesh sample configs/quickstart.yaml --prompt "a rabbit" --rewrite configs/rewriting.yaml',
        'cinemesh sample configs/quickstart.yaml --prompt "A grey rabbit." --trace-change change.png',
    ),
    "upsample": (
        "cinemesh upsample runs/upsampler clip.mp4 --out larger.mp4",
        "cinemesh upsample runs/upsampler clips --out larger --nproc 2 --json",
        'cinemesh upsample runs/upsampler/checkpoints/step-00000350 clip.mp4 --prompt "a rabbit" --guidance 2 --seed 3',
    ),
    "replay": (
        "cinemesh replay configs/quickstart.yaml --step 120",
        "cinemesh replay configs/quickstart.yaml --step 120 --float64 --nproc 2 --json",
    ),
    "export": (
        "cinemesh export runs/quickstart --out quickstart-hf",
        "cinemesh export runs/quickstart/checkpoints/step-00000700 --weights master --dtype bfloat16 --out bf16",
    ),
    "import": ("cinemesh import quickstart-hf --out imported",),
    "merge": (
        "cinemesh merge runs/rabbit --out runs/rabbit/merged",
        "cinemesh merge runs/rabbit/checkpoints/step-00000300 --base bases/step-00000700 --out merged",
    ),
    "average": (
        "cinemesh average runs/a/checkpoints/step-00000700 runs/b/checkpoints/step-00000700 --out runs/mean",
        "cinemesh average runs/a/checkpoints/step-00000700 runs/b/checkpoints/step-00000700 --out runs/kept "
        "--config configs/quickstart.yaml --greedy",
    ),
    "curate": (
        "cinemesh curate configs/curation/quickstart.yaml --out curated --recipe configs/quickstart.yaml",
        "cinemesh curate configs/curation/quickstart.yaml --out curated --set videos.text.below=0.4 --json",
        "cinemesh curate configs/curation/film.yaml --out curated --workers 8 --engine ray",
    ),
    "pick serve": ("cinemesh pick serve curated/curated.parquet",),
    "pick export": ("cinemesh pick export curated/curated.parquet --out picked.parquet",),
    "list": ("cinemesh list", "cinemesh list --json"),
    "cluster": ("cinemesh cluster grand-teton-h100", "cinemesh cluster local-cpu --json"),
    "model": ("cinemesh model movie-gen-30b", "cinemesh model tiny --json"),
    "plan": (
        "cinemesh plan --gpus 6144",
        "cinemesh plan --gpus 6144 --tune --explain",
        "cinemesh plan --gpus 256 --model movie-gen-5b --global-batch 256 --out 5b.yaml",
        "cinemesh plan --gpus 1024 --latent 32x96x96:0.7 --latent 1x96x96:0.3 --cluster h200-ib400 --json",
        "cinemesh plan --gpus 6144 --fix tp=4,cp=2 --report report/",
        "cinemesh plan --gpus 8192 --servers 1024",
        "cinemesh plan --gpus 256 --model movie-gen-5b --global-batch 256 --goodput --price 2.5",
        "cinemesh plan --sample",
        "cinemesh plan --sample --gpus 16 --latent 32x96x96 --json",
        "cinemesh plan --paper",
        "cinemesh plan --encode 256x768x768:100000000",
        "cinemesh plan configs/quickstart.yaml --gpus 4 --cluster local-cpu --tune --out plan.yaml",
    ),
    "explain": (
        f"cinemesh explain {PAPER}",
        "cinemesh explain 5b.yaml --model movie-gen-5b --global-batch 256 --json",
        "cinemesh explain tp=2 --recipe configs/quickstart.yaml --cluster local-cpu",
    ),
    "compare": (f"cinemesh compare {PAPER} tp=2,cp=4,dp_shard=768,recompute=o:lse",),
    "validate": (
        "cinemesh validate --rows --json",
        "cinemesh validate FOLDER/rows.yaml --cluster local-cpu",
        "cinemesh validate FOLDER/acceptance.json",
    ),
    "verify": (
        "cinemesh verify --plan tp=2,cp=2,dp_shard=2",
        "cinemesh verify --plan 5b.yaml --model movie-gen-5b --dtype bf16",
    ),
    "lint": (f"cinemesh lint --plan {PAPER} --model movie-gen-30b", "cinemesh lint --plan tp=2,kv_slices=1 --json"),
    "trace": (
        "cinemesh trace --plan tp=2",
        "cinemesh trace --plan cp=2,kv_slices=2,grad_units=2 --out step.trace.json --steps 5",
    ),
    "profile": (
        "cinemesh profile configs/quickstart.yaml --nproc 2",
        "cinemesh profile configs/quickstart.yaml --nproc 2 --plan cp=2,dtype=float32 --steps 6 --out profiled --json",
    ),
    "program": (
        f"cinemesh program --model movie-gen-30b --plan {PAPER}",
        "cinemesh program --model tiny --plan tp=2,dp_shard=2 --latent 3x4x12 --json",
    ),
    "kernels": (
        "cinemesh kernels",
        "cinemesh kernels --model movie-gen-5b --plan tp=2,dp_shard=8 --device sm_90 --json",
        f"cinemesh kernels --compile sm_90 --plan {PAPER}",
        "cinemesh kernels --tune --seconds 600 --out h200.yaml",
    ),
    "calibrate": (
        "cinemesh calibrate --out here.yaml --nproc 2",
        "cinemesh calibrate --card card.json --base h200-ib400 --out h200.yaml --table tuning/h200.yaml",
        "cinemesh calibrate --nccl-tests all_gather.log --base dgx-h100-ib400 --out ours.yaml",
        "cinemesh calibrate --acceptance acceptance.json --base dgx-h100-ib400 --out ours.yaml",
        "cinemesh calibrate --profile profiled/profile.json --base local-cpu --out here.yaml",
    ),
    "data index": (
        "cinemesh data index shards/ --out clips.parquet",
        "cinemesh data index energon/ curated.parquet --split train --caption text --out clips.parquet",
    ),
    "data build": (
        "cinemesh data build configs/quickstart.yaml --nproc 2",
        "cinemesh data build configs/quickstart.yaml --after 0123456789abcdef --set data.captions=more.parquet",
    ),
    "data show": ("cinemesh data show runs/quickstart/cache",),
    "data check": ("cinemesh data check runs/quickstart/cache",),
    "data withdraw": ("cinemesh data withdraw runs/quickstart/cache --clip taxi --clip bus",),
    "data seen": (
        "cinemesh data seen runs/quickstart --clip taxi",
        "cinemesh data seen runs/quickstart --id 17 --json",
    ),
    "codec eval": (
        "cinemesh codec eval --codec dct-context --json",
        "cinemesh codec eval --codec dct-context --frechet",
        "cinemesh codec eval configs/quickstart.yaml --codec ours.safetensors",
        "cinemesh codec eval --codec runs/tae/autoencoder --unseen --set data.clips=[new] --set data.captions=new.yaml",
    ),
    "codec fit": ("cinemesh codec fit configs/quickstart.yaml --set data.stride=4 --out ours.safetensors",),
    "rewrite make": (
        'cinemesh rewrite make configs/rewriting.yaml --prompt "a cat on a skateboard"',
        "cinemesh rewrite make configs/rewriting.yaml --prompts prompts.yaml --out rewritten",
    ),
    "rewrite serve": ("cinemesh rewrite serve rewritten",),
    "rewrite export": ("cinemesh rewrite export rewritten --held-out 0.2 --out pairs",),
    "rewrite score": ("cinemesh rewrite score student.yaml pairs/held_out.jsonl --json",),
    "tae train": (
        "cinemesh tae train configs/tae/quickstart.yaml",
        "cinemesh tae train configs/tae/quickstart.yaml --nproc 2 --set logging.directory=runs/tae-2",
    ),
    "tae encode": (
        "cinemesh tae encode runs/tae/autoencoder configs/quickstart.yaml --out latents.safetensors",
        "cinemesh tae encode runs/tae/autoencoder configs/quickstart.yaml --out latents.safetensors --decoded again "
        "--nproc 2",
    ),
    "judge make": (
        "cinemesh judge make runs/new runs/old --out judged",
        "cinemesh judge make runs/a runs/b runs/c --prompts bench.jsonl --best-of c=4 --fit --out judged",
    ),
    "judge serve": ("cinemesh judge serve judged",),
    "judge export": (
        "cinemesh judge export judged --out for-label-studio",
        "cinemesh judge export judged --clips-at https://storage/judged/clips --out for-label-studio",
    ),
    "judge import": ("cinemesh judge import export.json judged",),
    "judge score": (
        "cinemesh judge score judged/votes.jsonl",
        "cinemesh judge score judged/votes.jsonl --deviation 2 --json",
        "cinemesh judge score judged/votes.jsonl --loss new=0.93 --loss old=1.04 --plot losses.png",
    ),
}


def epilog(command: str) -> str:
    """What stands below the options of ``command``."""
    lines = "".join(f"    {line}\n" for line in EXAMPLES[command])
    return f"\b\nExamples:\n{lines}\n\nExit codes: {CODES.get(command, DONE)}"
