"""`knnlm train`: a small language model from text."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from knnlm.cli.common import JsonOption, SourcesArgument, print_json, progress, remark


def train(
    sources: SourcesArgument,
    out: Annotated[Path, typer.Option(help="The Hugging Face folder to write.")],
    tokens: Annotated[int, typer.Option(help="Tokens to train on, repeats included.")],
    vocab_size: Annotated[int, typer.Option(help="Size of the byte-level BPE vocabulary.")] = 4096,
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 4,
    width: Annotated[int, typer.Option(help="Hidden size.")] = 256,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    context: Annotated[int, typer.Option(help="Context length in tokens.")] = 512,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of one step.")] = 8192,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Seed of weights and order.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    compile_model: Annotated[
        bool, typer.Option("--compile", help="Compile the model first (needs a C++ compiler).")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a small Llama-shaped LM and its tokenizer on text. Stopped runs continue with the same command."""
    from knnlm.datastore.text import read_documents
    from knnlm.lm.training import TrainSettings
    from knnlm.lm.training import train as run

    settings = TrainSettings(
        tokens=tokens, vocab_size=vocab_size, layers=layers, width=width, heads=heads, context=context,
        batch_tokens=batch_tokens, learning_rate=learning_rate, seed=seed,
    )  # fmt: skip
    documents = list(read_documents(sources))
    with progress("tokens", settings.steps * batch_tokens, description="training") as update:

        def on_step(step: int, loss: float, _rate: float) -> None:
            update(step * batch_tokens, f"loss {loss:.3f}")

        try:
            report = run(documents, out, settings, device=device, compile_model=compile_model, on_step=on_step)
        except KeyboardInterrupt:
            remark("stopped: the same command continues from the last saved state")
            raise
    if as_json:
        print_json(asdict(report))
        return
    print(
        f"{out}: {report.parameters:,} parameters, {settings.steps * settings.batch_tokens:,} tokens seen, "
        f"held-out loss {report.held_out_loss:.4f} nats/token ({report.held_out_bits_per_byte:.4f} bits/byte)"
    )
