"""kat-ray's teacher server and its callers, built without a process: what tests of it have in common."""

from dataclasses import replace

from actors.teacher.server import Listening, TeacherServer
from actors.teacher.service import Limits, TeacherService
from actors.teacher.settings import ScorerSettings
from actors.teacher.transformers_backend import TransformersTeacher
from kat_ray.config import Config
from kat_ray.remote.info import ServerInfo
from kat_ray.types.records import EngineEnd
from tests.support.chunks import chunk_of
from tests.support.configs import make_config

FAST = {"retry_seconds": 20.0, "connect_seconds": 2.0}


def settings_of(models, url=None, objective=None, **http):
    config = make_config(models["student"][0], models["teacher"][0], objective=objective or {})
    if url:
        tree = config.model_dump(mode="json")
        tree["teacher"] |= {"type": "http", "url": url, "http": {**FAST, **http}}
        config = Config.model_validate(tree)
    return ScorerSettings.from_config(config, models["teacher"][0], (1, 5), 64, 200)


def info_of(**changes):
    found = ServerInfo(
        1, "m", "Qwen3ForCausalLM", 200, 64, (1,), "float32", "transformers", True, True, True, "", 2**24, 200, True
    )
    return replace(found, **changes)


def server_of(models, token=None, limits=None, info=None, **listening):
    service = TeacherService(TransformersTeacher(settings_of(models)), "the model", limits or Limits(64))
    return service, TeacherServer(service, info or info_of(), token, Listening(**listening))


def pieces(student, rollouts, size):
    at, longest = 0, max(len(tokens) for _, tokens in rollouts.values())
    while at < longest:
        live = {i: r for i, r in rollouts.items() if at < len(r[1])}
        end = {i: min(at + size, len(r[1])) for i, r in live.items()}
        ended = {i: EngineEnd.EOS for i in live if end[i] == len(live[i][1])}
        yield chunk_of(student, live, start=dict.fromkeys(live, at), end=end, ended=ended)
        at += size


def assert_same(a, b):
    for name in ("d", "overlap", "teacher_max", "teacher_entropy", "teacher_top"):
        assert getattr(a[0], name).tobytes() == getattr(b[0], name).tobytes(), name
    assert_same_rows(a[1], b[1])


def assert_same_rows(a, b):
    for name in ("topk_logprobs", "tail_logprobs", "stop_logprobs"):
        assert getattr(a, name).tobytes() == getattr(b, name).tobytes(), name
    ids = [rows.topk_ids() for rows in (a, b)]
    assert (ids[0] is None) == (ids[1] is None) and (ids[0] is None or ids[0].tolist() == ids[1].tolist())
