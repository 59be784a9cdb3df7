"""`mlx-vlm-mini train`: teach a model from conversations with pictures."""

from pathlib import Path
from typing import Any

import click

from .options import DTYPES
from .status import Status


@click.command("train")
@click.argument("model", metavar="MODEL")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="JSONL of conversations.")
@click.option("--valid", type=click.Path(path_type=Path), help="JSONL to measure the loss on at every checkpoint.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder of the run and of its result.")
@click.option(
    "--stage", type=click.Choice(["projector", "full", "lora"]), default="full", show_default=True, help="What learns."
)
@click.option("--steps", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--accumulate", type=click.IntRange(1), default=1, show_default=True, help="Batches that make one step.")
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=1e-3, show_default=True)
@click.option(
    "--warmup", type=click.IntRange(0), default=100, show_default=True, help="Steps to the full learning rate."
)
@click.option(
    "--optimizer",
    type=click.Choice(["adamw", "muon"]),
    default="adamw",
    show_default=True,
    help="muon: matrices by Muon.",
)
@click.option("--weight-decay", type=click.FloatRange(0), default=0.01, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the order of the data.")
@click.option("--in-order", is_flag=True, help="Take the data as it stands, a curriculum, instead of shuffled.")
@click.option("--checkpoint-every", type=click.IntRange(1), default=200, show_default=True, help="Steps.")
@click.option("--rank", type=click.IntRange(1), default=8, show_default=True, help="Of LoRA's adapters.")
@click.option("--scale", type=float, default=20.0, show_default=True, help="Of LoRA's adapters.")
@click.option("--dtype", type=DTYPES, help="Type of the tensors in the result.  [default: as in MODEL]")
@click.option("--revision", metavar="REV", help="Branch, tag or commit on the Hub.")
def command(
    model: str, data: Path, valid: Path | None, output: Path, dtype: Any, revision: str | None, **settings: Any
) -> None:
    """Train MODEL on the conversations of a JSONL file; a run that was stopped goes on when started again.

    A line is {"messages": [...]} with paths of images relative to the file, or LLaVA's conversation form. Only what the
    assistant says is learned. OUT/model is the result, a checkpoint folder like MODEL; `--stage lora` also leaves its
    adapters in OUT/adapters.

    \b
    Example:
      mlx-vlm-mini train my-llava --data data.jsonl --stage projector --output run-1
    """
    from mlx_vlm_mini.layers.cpu.blas import use_openblas

    use_openblas()
    import mlx.core as mx

    from mlx_vlm_mini.checkpoints.assembly import open_model
    from mlx_vlm_mini.checkpoints.load import load_processor, plan
    from mlx_vlm_mini.checkpoints.weights import load_weights
    from mlx_vlm_mini.data.examples import read_examples
    from mlx_vlm_mini.files import one_process
    from mlx_vlm_mini.train.lora import fuse_adapters, save_adapters
    from mlx_vlm_mini.train.save import save_trained
    from mlx_vlm_mini.train.trainer import Settings, Trainer

    with Status() as status, one_process(output):
        status.show(f"checking {data}")
        examples = read_examples(data)
        held = read_examples(valid) if valid is not None else []
        status.show(f"loading {model}")
        checkpoint = open_model(model, revision=revision)
        planned = plan(checkpoint)
        processor = load_processor(checkpoint, planned.family, planned.config)
        load_weights(planned.model, planned.ours, checkpoint, mx.float32, planned.family.WEIGHTS)
        planned.model.train()
        trainer = Trainer(planned.model, processor, examples, output, Settings(**settings), valid=held)
        if trainer.step:
            click.echo(f"going on at step {trainer.step} of {trainer.settings.steps}", err=True)
        for progress in trainer.run():
            line = (
                f"step {progress.step} of {progress.steps}, loss {progress.loss:.4f}, "
                f"{progress.tokens_per_s:,.0f} tokens/s, {progress.left_s / 60:.0f} min left"
            )
            status.show(line)
            if progress.valid_loss is not None:
                status.clear()
                right = f"{100 * (progress.valid_right or 0):.1f} % of its answers right"
                click.echo(f"{line}, validation loss {progress.valid_loss:.4f}, {right}", err=True)
        planned.model.eval()
        if trainer.settings.stage == "lora":
            save_adapters(planned.model, output / "adapters", trainer.settings.rank, trainer.settings.scale)
            fuse_adapters(planned.model)
        save_trained(planned, output / "model", getattr(mx, dtype) if dtype is not None else None)
    click.echo(f"{output / 'model'}: trained for {trainer.settings.steps} steps on {len(examples)} conversations")
