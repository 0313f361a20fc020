"""Serve a scorer over HTTP, for runs on other machines or in other environments (docs/rewards.md).

python -m rewards.serve pickscore --port 8000
python -m rewards.serve my_reward:Warmth --port 8001
"""

import json
import math
import sys
import threading

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from fdfo.config.command_line import parse_serve_config
from fdfo.config.errors import UserError, brief
from fdfo.distributed.launch import run_command_line, start_job
from fdfo.distributed.port import open_port
from rewards.presets import SET_SCORERS
from rewards.registry import VlmSettings, build_scorers, check_metric_name
from rewards.remote.png import from_png
from rewards.scorer import Scorer, checked_scores, describe

LARGEST_QUESTION = 2**28  # bytes


def main() -> None:
    config = parse_serve_config(sys.argv[1:])
    check_metric_name(config.scorer)
    if config.scorer in SET_SCORERS:
        raise UserError(
            f"{config.scorer} compares the images of one prompt, and a server scores single images: serve another scorer."
        )
    with start_job() as job:
        # before the scorer is loaded, so that a run that starts meanwhile waits for it
        listening = open_port(config.scorer, config.host, config.port, "--port or --host")
        scorers = build_scorers([config.scorer], job, VlmSettings(config.vlm_model))
        app = build_app(config.scorer, scorers[config.scorer])
        address = f"http://{config.host}:{listening.getsockname()[1]}/score"
        job.print(f"serving {config.scorer} at {address}: {describe(scorers)[config.scorer]}")
        settings = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", ws="none", proxy_headers=False)
        uvicorn.Server(settings).run(sockets=[listening])


def build_app(name: str, scorer: Scorer) -> Starlette:
    """Return the app that answers POST /score of {"prompts", "images"} with {"scores"}: one batch at a time, in any thread."""
    one_at_a_time = threading.Lock()

    def scores(body: bytearray) -> Response:
        try:
            prompts, images = read_question(body)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            return PlainTextResponse(f"The question is malformed ({brief(error)}).", 400)
        try:
            with one_at_a_time:
                values = checked_scores(name, scorer, prompts, images)
        except UserError as error:
            failed = error.__cause__ is not None  # an exception of the scorer, not its own sentence about the question
            return PlainTextResponse(str(error), 500 if failed else 422)
        return JSONResponse({"scores": [value if math.isfinite(value) else None for value in values.tolist()]})

    async def score(request: Request) -> Response:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > LARGEST_QUESTION:
                return PlainTextResponse(f"A question has at most {LARGEST_QUESTION:,} bytes.", 413)
        return await run_in_threadpool(scores, body)

    return Starlette(routes=[Route("/score", score, methods=["POST"])])


def read_question(body: bytearray) -> tuple[list[str], torch.Tensor]:
    """Read the prompts [N] and images [N, 3, H, W] uint8 of a question. Raises ValueError, KeyError or TypeError for another one."""
    question = json.loads(body)
    prompts, images = question["prompts"], question["images"]
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("prompts is no list of texts")
    if not isinstance(images, list) or len(images) != len(prompts):
        raise ValueError("images is no list with one for each prompt")
    decoded = [from_png(image) for image in images]
    if len({image.shape for image in decoded}) > 1:
        raise ValueError("the images are of several sizes")
    return prompts, torch.stack(decoded)


if __name__ == "__main__":
    run_command_line(main)
