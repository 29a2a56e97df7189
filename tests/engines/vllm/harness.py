"""vLLM engines in processes of their own, what they are asked, and what an engine without mmcache answers.

`Engine` is one process with one engine; leaving it and starting another is a true restart. `Expected` has the answers
of the plain engine: it starts one for everything that was planned with `Expected.plan`, and remembers the answers in
the engines' folder, by a digest of everything they depend on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tests.engines.cache import Cache
from tests.engines.vllm.models import FOLDER, IMAGE, MODELS, ROOT

BLOCK = 32  # tokens
CLOSE = 3e-4  # logprobs of one token in float32, computed in batches of other sizes
START_S = 400.0
ANSWER_S = 180.0
DEADLINE_S = 16.0  # of the cache: also on a machine that stands still for seconds, what it has is a hit
ASKS_PER_CALL = 32  # of the plain engine, each of which may take its time
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOOPBACK_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
Ask = dict[str, Any]


def ask(text: str = "", *pictures: int | dict[str, Any], **more: Any) -> Ask:
    """What one request says: a text, and for each picture (a seed, or what `images.media` takes) an IMAGE in it.

    Pictures the text has no place for come first. `more`: videos, uuids, salt, kwargs (of the processor), lora (name,
    number, model or folder), max_tokens, skip_reading, tokens or embeds (seed, rows) instead of text, and `then`: the
    next turns.
    """
    wanted: Ask = dict(more)
    if not {"tokens", "embeds"} & more.keys():
        wanted["text"] = IMAGE * (len(pictures) - text.count(IMAGE)) + text
    if pictures:
        wanted["images"] = [{"kind": "picture", "seed": one} if isinstance(one, int) else one for one in pictures]
    return wanted


def words(seed: int, count: int) -> str:
    """A text of `count` tokens; other seeds share no block."""
    out = ""
    while len(out) < count:
        out += hashlib.sha256(f"{seed}/{len(out)}".encode()).hexdigest() + " "
    return out[:count]


@dataclass(frozen=True)
class Settings:
    """One engine's configuration: a model of `models.MODELS` or a folder, and arguments of `vllm.LLM`."""

    model: str
    llm: dict[str, Any] = field(default_factory=dict)

    def resolved(self, cache: dict[str, Any] | None) -> dict[str, Any]:
        """For the worker: with mmcache and these connector settings, or plain and without any prefix cache."""
        llm: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": True,
            "block_size": BLOCK,
            "max_model_len": 1024,
            "max_num_seqs": 8,
            "seed": 0,
        }
        if cache is None:
            llm |= {"enable_prefix_caching": False, "mm_processor_cache_gb": 0}
        else:
            llm["kv_transfer_config"] = {
                "kv_connector": "MMCacheKVConnector",
                "kv_connector_module_path": "mmcache_connectors.vllm",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"deadline_s": DEADLINE_S} | cache,
            }
        llm |= self.llm
        return {"model": self.model, "llm": llm}


@dataclass(frozen=True)
class Answer:
    """What came back: generated tokens, the prompt's, and how many of them no engine had to compute."""

    tokens: list[int]
    prompt: list[int]
    cached: int
    seconds: float = 0.0
    finish: str = ""
    logprobs: list[float] = field(default_factory=list)
    error: str = ""
    margins: list[float] = field(default_factory=list)  # by how much each token's logprob was the best
    external: int = 0  # of `cached`, and again after a preemption, what came through the connector, where it is counted

    @property
    def reusable(self) -> int:
        """The tokens a cache can save: whole blocks, but never the last token, which the engine must compute."""
        return (len(self.prompt) - 1) // BLOCK * BLOCK

    def same(self, other: Answer) -> bool:
        """Whether the same tokens were generated, from the same logits but for rounding, or both were refused."""
        pairs = zip(self.logprobs, other.logprobs, strict=False)
        outcome = (self.tokens, self.prompt, self.finish, self.error)
        return outcome == (other.tokens, other.prompt, other.finish, other.error) and all(
            abs(mine - theirs) < CLOSE for mine, theirs in pairs
        )

    def sure(self, margin: float) -> int:
        """How many tokens there are before the first that was the best by less than this."""
        return next((place for place, one in enumerate(self.margins) if one < margin), len(self.tokens))

    @property
    def hit(self) -> bool:
        """Whether at least 95% of what can be reused was."""
        return self.reusable > 0 and self.cached >= 0.95 * self.reusable


VISION = Settings(
    "vision",
    {
        "enable_lora": True,
        "max_loras": 2,
        "max_lora_rank": 8,
        "limit_mm_per_prompt": {"image": 3, "video": 1},
        "max_num_batched_tokens": 512,  # longer prompts are cut into chunks
    },
)
WRITTEN: list[Ask] = []  # what the suite's first engine, configured as VISION, stores for the others to find


def written(wanted: Ask) -> Ask:
    """Have the suite's first engine answer this ask, and so store its KV, before any other engine starts."""
    WRITTEN.append(wanted)
    return wanted


class EngineDied(AssertionError):
    """The engine's process ended or went silent; the message holds the end of its log."""


class Engine:
    """One engine in one process. Use as a context manager; leaving it ends the process.

    `worker` is the module it runs: tests.engines.vllm.worker, or one that serves a Worker with more operations.
    """

    def __init__(
        self,
        settings: Settings,
        cache: dict[str, Any] | None,
        environment: dict[str, str] | None = None,
        worker: str = "tests.engines.vllm.worker",
    ) -> None:
        self.cache = cache or {}
        self._worker = worker
        self._settings = settings.resolved(cache)
        self._environment = os.environ | ENVIRONMENT | (environment or {})
        self._log: IO[bytes]  # a file, as a pipe nobody reads would stop a talkative engine
        self._said = ""
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile()
        command = [sys.executable, "-m", self._worker, json.dumps(self._settings)]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            self._answer(START_S)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process: its input ends, and it with it; by force if it does not."""
        process, self.process = self.process, None
        if process is None:
            return
        assert process.stdout is not None
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        self._said = self.log()
        self._log.close()

    def begin(self, op: str, **arguments: Any) -> None:
        """Start one operation of the worker; `finish` waits for it."""
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
        self.process.stdin.flush()

    def finish(self, timeout_s: float = ANSWER_S) -> Any:
        """What the operation under way gives. Raises EngineDied if it gives nothing in time."""
        return self._answer(timeout_s)

    def call(self, op: str, timeout_s: float = ANSWER_S, **arguments: Any) -> Any:
        """One operation of the worker."""
        self.begin(op, **arguments)
        return self.finish(timeout_s)

    def generate(self, *asks: Ask, together: bool = False, timeout_s: float = ANSWER_S) -> list[Answer]:
        """The answers, in order."""
        return [Answer(**answer) for answer in self.call("generate", timeout_s, asks=asks, together=together)]

    def fresh(self, *asks: Ask, together: bool = False) -> list[Answer]:
        """The same after vLLM's own prefix cache was emptied: what is cached comes from mmcache."""
        self.reset()
        return self.generate(*asks, together=together)

    def found(self, wanted: Ask, truth: Answer) -> Answer:
        """Ask anew, as it should be a hit now; the answer must be this one. With an adapter up to three times: of such
        a request nothing is stored if it ends before it is known that the adapter's files are still the same."""
        for _ in range(3 if "lora" in wanted else 1):
            (answer,) = self.fresh(wanted)
            assert answer.same(truth), (answer, truth)
            if answer.hit:
                break
        return answer

    def reset(self) -> None:
        """Empty vLLM's own prefix cache. Fails if some request never gave its blocks back."""
        assert self.call("reset"), f"blocks were not freed\n{self.log()[-4000:]}"

    def counters(self) -> dict[str, dict[str, int]]:
        """The connector's, of its scheduler and its worker half."""
        found: dict[str, dict[str, int]] = self.call("counters")
        return found

    def log(self) -> str:
        """Everything the engine said so far."""
        if self._log.closed:
            return self._said
        log = self._log.fileno()
        return os.pread(log, os.fstat(log).st_size, 0).decode(errors="replace")

    def _answer(self, timeout_s: float) -> Any:
        assert self.process is not None
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            line = self.process.stdout.readline() if selector.select(timeout_s) else ""
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)  # what it dies of may not be written yet
            raise EngineDied(f"no answer within {timeout_s:.0f} s, or the process ended\n{self.log()[-8000:]}")
        return json.loads(line)


class Expected:
    """What the plain engine answers, for one configuration. Asks are planned when modules are imported."""

    _all: dict[str, Expected] = {}  # noqa: RUF012

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._planned: dict[str, Ask] = {}
        sources = [Path(__file__).with_name(name) for name in ("harness.py", "images.py", "models.py", "worker.py")]
        facts = [json.dumps(settings.resolved(None)), *(path.read_text() for path in sources)]
        self._path = FOLDER.parent / "expected" / f"{hashlib.sha256(''.join(facts).encode()).hexdigest()[:32]}.json"

    @classmethod
    def plan(cls, settings: Settings, *asks: Ask) -> Expected:
        """The answers for `settings`, with these asks among those that one plain engine is going to answer."""
        expected = cls._all.setdefault(json.dumps(settings.resolved(None)), cls(settings))
        expected._planned |= {json.dumps(_plain(one), sort_keys=True): _plain(one) for one in asks}
        return expected

    def prepare(self) -> None:
        """Have the plain engine answer what was planned and is not known yet. Call it while no other engine runs."""
        known = self._known()
        missing = {key: one for key, one in self._planned.items() if key not in known}
        if not missing:
            return
        with Engine(self._settings, cache=None) as engine:
            asks = list(missing.values())
            parts = [asks[start : start + ASKS_PER_CALL] for start in range(0, len(asks), ASKS_PER_CALL)]
            answers = [answer for part in parts for answer in engine.call("generate", asks=part)]
        known |= dict(zip(missing, answers, strict=True))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(known))
        os.replace(scratch, self._path)

    def of(self, *asks: Ask) -> list[Answer]:
        """The plain engine's answers to asks that were planned."""
        known = self._known()
        return [Answer(**known[json.dumps(_plain(one), sort_keys=True)]) for one in asks]

    def _known(self) -> dict[str, dict[str, Any]]:
        known: dict[str, dict[str, Any]] = json.loads(self._path.read_text()) if self._path.exists() else {}
        return known


def _plain(wanted: Ask) -> Ask:
    """Without what must not change an answer: names that callers give to pictures, tenants, reading habits."""
    return {name: value for name, value in wanted.items() if name not in ("uuids", "salt", "skip_reading")}


def made(name: str) -> Path:
    """The folder of a model, made in a process of its own: making it takes torch."""
    assert name in MODELS
    subprocess.run([sys.executable, "-m", "tests.engines.vllm.models", name], cwd=ROOT, check=True, capture_output=True)
    return FOLDER / name


@dataclass(frozen=True)
class FirstRun:
    """What the suite's first engine left: the filled cache, its answers to WRITTEN, and its connector's counters."""

    cache: Cache
    answers: list[Answer]
    counters: dict[str, int]
