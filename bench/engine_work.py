"""What the engine's benchmark asks of every trainer: the same models, prompts, lengths, optimiser steps and reward.

Models have random weights in the shapes of real ones, and responses a fixed length, so that the work does not depend on
what a policy says. Tokens are the words t0, t1, ...; the reward is the share of response tokens with an even number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rlhf_engine import data
from rlhf_engine.bench.clock import spread
from rlhf_engine.types import Prompts

PHASES = ("rollout", "score", "update")
Line = dict[str, Any]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Shape:
    """A decoder like Llama's with tied embeddings."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    dtype: torch.dtype = torch.float32


SMOLLM2 = Shape("SmolLM2-135M", 576, 30, 9, 3, 1536, 49152, torch.bfloat16)
QWEN = Shape("Qwen2.5-0.5B", 896, 24, 14, 2, 4864, 151936, torch.bfloat16)
SMALL = Shape("8 layers of 256", 256, 8, 4, 2, 768, 16384)
TINY = Shape("4 layers of 32", 32, 4, 2, 1, 64, 512)


@dataclass(frozen=True)
class Work:
    """One round on one shape: `batch` episodes, `epochs` passes of `minibatches` optimiser steps.

    "all layers" trains everything of the policy, and the layers of a critic as large; "frozen trunk" trains the last
    layers, and its critic is a head on the reference. A micro-batch is a whole minibatch, as TRL has it.
    """

    shape: Shape
    setting: str
    train_layers: int  # -1: all of them, and the embeddings
    batch: int
    prompt_tokens: int
    response_tokens: int
    minibatches: int
    epochs: int = 1
    lr: float = 1e-5

    @property
    def everything(self) -> bool:
        return self.train_layers == -1

    @property
    def micro_batch(self) -> int:
        return self.batch // self.minibatches

    @property
    def tokens_trained(self) -> int:
        """Response tokens that an update sees."""
        return self.batch * self.response_tokens * self.epochs

    def line(self, way: str, version: str = "", note: str = "") -> Line:
        """What a line of results says before anything was measured."""
        config = asdict(self) | {"shape": asdict(self.shape), "micro_batch": self.micro_batch}
        config["dtype"] = config["shape"]["dtype"] = str(self.shape.dtype).removeprefix("torch.")
        return {
            "kind": "engine", "way": way, "version": version, "note": note, "model": self.shape.name,
            "setting": self.setting, "config": config,
        }  # fmt: skip


def works(device: torch.device, quick: bool) -> list[Work]:
    """On a GPU the shapes of two real models; on a CPU one that takes seconds a round; `quick` takes none."""
    if quick:
        sizes: list[tuple[Shape, int, dict[str, int]]] = [
            (TINY, 2, {"batch": 8, "prompt_tokens": 6, "response_tokens": 8, "minibatches": 2})
        ]
    elif device.type == "cuda":
        size = {"batch": 64, "prompt_tokens": 128, "response_tokens": 256, "minibatches": 4}
        sizes = [(SMOLLM2, 6, size), (QWEN, 6, size)]
    else:
        sizes = [(SMALL, 6, {"batch": 16, "prompt_tokens": 32, "response_tokens": 48, "minibatches": 4})]
    return [
        Work(shape, setting, layers, **size)
        for shape, last, size in sizes
        for setting, layers in (("all layers", -1), ("frozen trunk", last))
    ]


def times(work: Work, rounds: list[dict[str, float]]) -> Line:
    """Of rounds, the first of which is given apart."""
    first, *timed = [seconds | {"step": sum(seconds[phase] for phase in PHASES)} for seconds in rounds]
    seconds = {phase: asdict(spread([one[phase] for one in timed])) for phase in (*PHASES, "step")}
    rate = work.batch * work.response_tokens / seconds["step"]["median"]
    return {"first": first, "seconds": seconds, "steps": len(timed), "tokens_per_second": rate}


def usual_steps(device: torch.device, quick: bool) -> int:
    """How many are timed."""
    return 2 if quick else 5 if device.type == "cuda" else 3


def model_config(shape: Shape) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, intermediate_size=shape.ffn, vocab_size=shape.vocabulary,
        max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip


def policy(shape: Shape, device: torch.device) -> Any:
    """Random weights, the same for everybody."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(model_config(shape), dtype=shape.dtype).eval().to(device)


def tokenizer(shape: Shape) -> Any:
    """A word for each token; the last one ends sequences. Padding has a number that no model here can sample."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {f"t{number}": number for number in range(shape.vocabulary - 1)}
    words |= {"<end>": shape.vocabulary - 1, "<pad>": shape.vocabulary}
    made = Tokenizer(WordLevel(words, unk_token="t0"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<pad>", padding_side="left")


def texts(work: Work, rounds: int) -> list[list[str]]:
    """Prompts of each round, no two alike."""
    generator = torch.Generator().manual_seed(1)
    size = (rounds, work.batch, work.prompt_tokens)
    numbers = torch.randint(0, work.shape.vocabulary - 1, size, generator=generator)
    # The number of a prompt, in digits of that base, is written at its end.
    order = torch.arange(rounds * work.batch).view(rounds, work.batch)
    numbers[..., -1], numbers[..., -2] = order % 256, order // 256
    return [[" ".join(f"t{x}" for x in row) for row in batch] for batch in numbers.tolist()]


def prompts(work: Work, rounds: int, words: Any) -> Iterator[Prompts]:
    for number, batch in enumerate(texts(work, rounds)):
        yield data.make_prompts(batch, words, [f"p{number}.{row}" for row in range(len(batch))])


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    """Share of tokens with an even number, the token that ends a sequence not among them."""
    numbers = [[int(word[1:]) for word in response.split()] for response in responses]
    return [sum(number % 2 == 0 for number in row) / max(1, len(row)) for row in numbers]
