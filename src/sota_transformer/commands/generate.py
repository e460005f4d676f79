"""`sota generate`: prompts from arguments, a file or standard input, continued in one batch."""

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from sota_transformer.commands.common import check, decoded, open_to_generate, text_of, warn
from sota_transformer.data.tokenizer import EOT, Tokenizer
from sota_transformer.errors import BAD_DATA, SotaError
from sota_transformer.inference.batch import Drawn, Job, run_jobs
from sota_transformer.inference.generate import make_sampler
from sota_transformer.options import Generate


def run_generate(options: Generate) -> int:
    """Continue prompts: streamed text, or one JSON object per prompt."""
    check(
        {
            "--max-tokens must be at least 1": options.max_tokens >= 1,
            "--temperature must be in [0, 1e6)": 0 <= options.temperature < 1e6,
            "--top-k and --seed must be 0 or more": options.top_k >= 0 and options.seed >= 0,
            "--top-p must be in (0, 1]": 0 < options.top_p <= 1,
            "--min-p must be in [0, 1]": 0 <= options.min_p <= 1,
            "--repetition-penalty must be in (0, 1e6)": 0 < options.repetition_penalty < 1e6,
            "--logprobs must be from -1 to 100": -1 <= options.logprobs <= 100,
            "--logprobs needs --json": options.logprobs < 0 or options.json,
            "give --prompt or --file, not both": not (options.prompt and options.file),
        }
    )
    prompts = list(map(_typed, options.prompt)) if options.file is None else _prompts(options.file)
    prompts = prompts or [""]
    opened = open_to_generate(options.run, options.device, options.step, options.dtype)
    tokenizer = Tokenizer()
    jobs = [
        Job(
            tokens=tokenizer.encode(prompt) or [EOT],
            sampler=make_sampler(
                options.temperature,
                options.top_k,
                options.top_p,
                options.min_p,
                options.repetition_penalty,
                options.seed + number,
            ),
            max_tokens=options.max_tokens,
            alternatives=options.logprobs if options.logprobs >= 0 else None,
            stops=tuple(map(_typed, options.stop)),
        )
        for number, prompt in enumerate(prompts)
    ]
    longest, context = max(len(job.tokens) for job in jobs), opened.model.config.seq_len
    if longest > context:
        warn(f"a prompt has {longest:,} tokens; the model sees the last {context:,} of them")
    pieces = run_jobs(opened.model, tokenizer, jobs)
    if len(jobs) == 1 and not options.json:
        print(prompts[0], end="", flush=True)
        for _, piece in pieces:
            print(piece.text, end="", flush=True)
        print()
        return 0
    drawn: list[list[Drawn]] = [[] for _ in jobs]
    shown = 0
    for number, piece in pieces:
        drawn[number].append(piece)
        while shown < len(jobs) and drawn[shown] and drawn[shown][-1].reason:
            _show(options, tokenizer, shown, prompts[shown], drawn[shown])
            drawn[shown] = [drawn[shown][-1]]  # free the memory of what has been shown
            shown += 1
    return 0


def _typed(text: str) -> str:
    """Command-line text; under an ASCII-only locale its bytes arrive as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return os.fsencode(text).decode(errors="replace")
    return text


def _show(
    options: Generate, tokenizer: Tokenizer, number: int, prompt: str, drawn: list[Drawn]
) -> None:
    """Print one finished continuation."""
    text = "".join(piece.text for piece in drawn)
    if not options.json:
        print(f"--- {number + 1}\n{prompt}{text}\n", flush=True)
        return
    kept = [piece for piece in drawn if piece.token != EOT]
    result: dict[str, Any] = {
        "prompt": prompt,
        "text": text,
        "tokens": [piece.token for piece in kept],
        "finish_reason": drawn[-1].reason,
        "seed": options.seed + number,
    }
    if options.logprobs >= 0:
        result["logprobs"] = [
            {
                "token": tokenizer.decode([piece.token]),
                "id": piece.token,
                "logprob": piece.logprob,
                "alternatives": [
                    {"token": tokenizer.decode([token]), "id": token, "logprob": nats}
                    for token, nats in piece.alternatives
                ],
            }
            for piece in kept
        ]
    print(json.dumps(result, ensure_ascii=False), flush=True)


def _prompts(path: Path) -> list[str]:
    """Prompts of a file: one per line, or the field `prompt` of each .jsonl line; - is stdin."""
    stdin = str(path) == "-"
    text = decoded(sys.stdin.buffer.read(), path) if stdin else text_of(path)
    text = io.StringIO(text, None).read()  # normalizes line ends to "\n"
    if stdin:
        return [text.removesuffix("\n")]  # `echo` adds one
    lines = {n: line for n, line in enumerate(text.split("\n"), 1) if line.strip()}
    if not lines:
        raise SotaError(f"{path}: needs at least one prompt", BAD_DATA)
    if path.suffix == ".jsonl":
        return [_prompt(path, number, line) for number, line in lines.items()]
    return list(lines.values())


def _prompt(path: Path, number: int, line: str) -> str:
    """The prompt of one .jsonl line. SotaError 65 naming the line."""
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError):
        prompt = None
    if not isinstance(prompt, str):
        raise SotaError(f"{path}:{number}: not an object with a string `prompt`", BAD_DATA)
    return prompt
