"""Evidence that an endpoint with keys lets nobody in without one, and that neither keys nor prompts get about.

    python tests/evidence/serving_security.py

Deploys one small random model on a Ray of its own, on loopback, with a key file, and attacks it: every route of the
published description without a key and with what only looks like one, bodies that are too long or too slow, chat
templates that reach for Python, names that reach for the file system, junk instead of HTTP. Then it looks for every
key, prompt and answer in all that Ray and Serve have written. Prints what was seen; exits with 1 when a claim fails.
About two minutes.
"""

import json
import re
import secrets
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import httpx  # noqa: E402
import ray  # noqa: E402

from cluster.serve import control  # noqa: E402
from cluster.serve.keys import REREAD_S, KeyFile, Keys  # noqa: E402
from cluster.serve.request_body import BodyLimits  # noqa: E402
from cluster.serve.settings import AppArgs  # noqa: E402
from tests.cluster.serve.local_ray import local_ray  # noqa: E402
from tests.cluster.serve.tiny_model import save_tiny_model  # noqa: E402
from tests.conftest import find_free_port  # noqa: E402

MODEL = "tiny"
JSON = {"Content-Type": "application/json"}
OPEN = {("GET", "/health"), ("GET", "/ready")}
TEMPLATE = """{%- set word = messages[0]['content'] -%}
{%- if word == 'class' -%}{{ ''.__class__.__mro__[1].__subclasses__() }}
{%- elif word == 'globals' -%}{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}
{%- elif word == 'lipsum' -%}{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}
{%- elif word == 'format' -%}{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}
{%- elif word == 'function' -%}{{ raise_exception.__globals__ }}
{%- elif word == 'attr' -%}{{ (''|attr('__class__')).__base__ }}
{%- elif word == 'change' -%}{{ messages.clear() }}
{%- elif word == 'include' -%}{% include '/etc/passwd' %}
{%- elif word == 'import' -%}{% import '/etc/passwd' as stolen %}
{%- else -%}{{ '<|user|>' + word + '<|assistant|>' }}{%- endif -%}"""
ATTACKS = re.findall(r"word == '(\w+)'", TEMPLATE)

_failed: list[str] = []


def claim(what: str, holds: bool, seen: object) -> None:
    print(f"{'ok  ' if holds else 'FAIL'} {what}: {seen}", flush=True)
    if not holds:
        _failed.append(what)


class Target:
    """The endpoint, and keys by name."""

    def __init__(self, url: str, keys: dict[str, str]) -> None:
        self.url = url
        self.port = httpx.URL(url).port
        self.keys = keys

    def ask(self, method: str, path: str, key: str | None = None, **options: object) -> httpx.Response:
        headers = {**JSON, **({"Authorization": f"Bearer {self.keys.get(key, key)}"} if key is not None else {})}
        headers |= options.pop("headers", {})  # type: ignore[arg-type]
        with httpx.Client(base_url=self.url, trust_env=False, timeout=60) as http:
            return http.request(method, path, headers=headers, **options)  # type: ignore[arg-type]

    def raw(self, data: bytes, pieces: Iterable[bytes] = (), wait_s: float = 30.0) -> tuple[bytes, int, float]:
        """Sends bytes as they are; the answer, the bytes that could be sent, and the seconds until the end."""
        started, sent, answer = time.monotonic(), len(data), b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait_s) as wire:
            try:
                wire.sendall(data)
                for piece in pieces:
                    wire.sendall(piece)
                    sent += len(piece)
            except OSError:
                pass  # cut off; what was answered before can still be read
            try:
                wire.settimeout(wait_s)
                while part := wire.recv(1 << 16):
                    answer += part
                    if b"\r\n\r\n" in answer and b"onnection: close" not in answer:
                        break
            except OSError:
                pass
        return answer, sent, time.monotonic() - started


def strangers(target: Target, description: dict) -> None:
    key = target.keys["plain"]
    disguises = {
        "none": {},
        "wrong": {"Authorization": "Bearer sk-caravan-" + secrets.token_urlsafe(32)},
        "almost": {"Authorization": f"Bearer {key[:-1]}"},
        "longer": {"Authorization": f"Bearer {key}x"},
        "basic": {"Authorization": f"Basic {key}"},
        "elsewhere": {"X-Api-Key": key, "Api-Key": key, "Cookie": f"key={key}", "Proxy-Authorization": f"Bearer {key}"},
        "removed": {"Authorization": f"Bearer {target.keys['removed']}"},
    }
    routes = [(method.upper(), path) for path, methods in description["paths"].items() for method in methods]
    routes += [("GET", "/openapi.json"), ("GET", "/metrics"), ("GET", "/"), ("GET", "//health"), ("GET", "/health/")]
    routes += [("GET", "/caravan/requests/x"), ("OPTIONS", "/v1/completions"), ("HEAD", "/v1/models")]
    statuses: Counter[int] = Counter()
    let_in, without_id = [], []
    for method, path in routes:
        for name, headers in disguises.items():
            response = target.ask(method, f"{path}?key={key}" if name == "elsewhere" else path, headers=headers)
            statuses[response.status_code] += 1
            if response.status_code != 401 and (method, path) not in OPEN:
                let_in.append((method, path, name, response.status_code))
            if response.status_code == 401 and "www-authenticate" not in response.headers:
                let_in.append((method, path, name, "no WWW-Authenticate"))
            if len(response.headers.get_list("x-request-id")) != 1:
                without_id.append((method, path, name))
    claim("nobody gets in without a key", not let_in, f"{sum(statuses.values())} requests, {dict(statuses)} {let_in}")
    claim("every response has one X-Request-Id", not without_id, without_id or "yes")
    operators = [target.ask("GET", path, "plain").status_code for path in ("/caravan/replicas", "/metrics")]
    claim("an ordinary key does not open the operator's routes", operators == [403, 403], operators)
    boss = target.ask("GET", "/caravan/replicas", "boss").status_code
    claim("an operator's key does", boss == 200, boss)


def junk(target: Target) -> None:
    host = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    bearer = b"Authorization: Bearer " + target.keys["plain"].encode() + b"\r\n"
    cases = {
        "two keys": host + bearer + b"Authorization: Bearer x\r\nContent-Length: 2\r\n\r\n{}",
        "no text": host + b"Authorization: Bearer \xff\xfe\xfd\r\nContent-Length: 2\r\n\r\n{}",
        "huge key": host + b"Authorization: Bearer " + b"x" * 60_000 + b"\r\nContent-Length: 2\r\n\r\n{}",
        "huge header": host + b"X-Junk: " + b"x" * 3_000_000 + b"\r\n\r\n",
        "both lengths": host
        + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /v1/models HTTP/1.1\r\n\r\n",
        "no HTTP": b"\x16\x03\x01\x02\x00" + secrets.token_bytes(512) + b"\r\n\r\n",
        "negative": host + b"Content-Length: -5\r\n\r\n",
        "wild id": host + b"X-Request-Id: \x1b[31m'\"{}%n\r\nContent-Length: 2\r\n\r\n{}",
    }
    seen = {}
    for name, data in cases.items():
        answer, _, _ = target.raw(data, wait_s=5)
        seen[name] = answer.split(b"\r\n")[0].decode(errors="replace").removeprefix("HTTP/1.1 ") or "closed"
    bad = {name: status for name, status in seen.items() if status.startswith(("2", "5"))}
    claim("junk opens nothing and breaks nothing", not bad, seen)
    claim("the server lives on", target.ask("GET", "/ready").status_code == 200, "ready")


def bodies(target: Target) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {target.keys['single']}\r\n".encode()
    head += b"Content-Type: application/json\r\n"
    limits = BodyLimits()

    def status(answer: bytes) -> str:
        return answer.split(b"\r\n")[0].decode(errors="replace").removeprefix("HTTP/1.1 ") or "closed"

    answer, _, seconds = target.raw(head + b"Content-Length: 10737418240\r\n\r\n")
    claim("10 GiB that are announced are refused at once", status(answer).startswith("413"), f"{seconds:.2f} s")
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    answer, sent, seconds = target.raw(head + b"Transfer-Encoding: chunked\r\n\r\n", (chunk for _ in range(16_000)))
    claim(
        "1 GB in chunks is cut off",
        sent < 128 << 20 and status(answer) in ("closed", "413 Request Entity Too Large", "413 Content Too Large"),
        f"{sent >> 20} MiB taken, {status(answer)}, {seconds:.2f} s",
    )

    def dribble() -> Iterator[bytes]:
        while True:
            time.sleep(0.5)
            yield b" "

    with ThreadPoolExecutor(2) as pool:
        silent = pool.submit(target.raw, head + b"Content-Length: 100\r\n\r\n{")
        time.sleep(1)
        meanwhile = target.ask("GET", "/v1/models", "single").status_code
        answer, _, seconds = silent.result()
        fine = status(answer).startswith("408") and seconds < limits.grace_s + 5
        claim("a body that stops is cut off", fine, f"{status(answer)} after {seconds:.1f} s")
        claim("it holds its key's only place until then", meanwhile == 429, meanwhile)
        answer, _, seconds = pool.submit(target.raw, head + b"Content-Length: 100000\r\n\r\n", dribble()).result()
        fine = status(answer)[:3] in ("408", "clo") and seconds < limits.grace_s + 5
        claim("one that dribbles as well", fine, f"{status(answer)} after {seconds:.1f} s")
    after = target.ask("GET", "/v1/models", "single").status_code
    claim("then the place is free", after == 200, after)


def places(target: Target) -> None:
    """A client that goes away gives its place back; limits are told."""
    body = {"model": MODEL, "prompt": "x", "max_tokens": 500, "n": 16, "stream": True, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {target.keys['single']}"}
    with httpx.stream("POST", f"{target.url}/v1/completions", json=body, headers=headers, trust_env=False) as stream:
        parts = stream.iter_bytes()  # kept: an iterator that nobody holds closes the stream
        next(parts)
        busy = target.ask("GET", "/v1/models", "single")
    left = time.monotonic()
    while target.ask("GET", "/v1/models", "single").status_code == 429 and time.monotonic() < left + 10:
        time.sleep(0.02)
    seconds = time.monotonic() - left
    claim("a second request at once is refused", busy.status_code == 429, busy.headers.get("retry-after"))
    claim("a client that goes away gives its place back", seconds < 2, f"{seconds:.2f} s")
    answers = [target.ask("GET", "/v1/models", "slow") for _ in range(3)]
    told = [answer.headers.get("x-ratelimit-remaining-requests") for answer in answers]
    claim("requests a minute are counted", [a.status_code for a in answers] == [200, 200, 429], told)


def templates(target: Target, canary: Path) -> None:
    seen = {}
    for attack in ATTACKS:
        body = {"model": MODEL, "messages": [{"role": "user", "content": attack}], "max_tokens": 1}
        response = target.ask("POST", "/v1/chat/completions", "plain", json=body)
        seen[attack] = response.status_code
        if "root:" in response.text or "<class" in response.text:
            seen[attack] = 200
    claim("no template reaches Python", set(seen.values()) == {400} and not canary.exists(), seen)
    texts = ["{{ 7 * 7 }}", "{% include '/etc/passwd' %}"]
    counts = []
    for text in texts:
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}]}
        tokens = target.ask("POST", "/tokenize", "plain", json=body).json()["tokens"]
        shown = target.ask("POST", "/detokenize", "plain", json={"model": MODEL, "tokens": tokens}).json()["prompt"]
        counts.append(text in shown)
    claim("a message is text and no template", counts == [True, True], counts)


def names(target: Target) -> None:
    statuses: Counter[int | str] = Counter()
    leaks = []
    for name in (
        "../../../../etc/passwd",
        "/etc/passwd",
        "..%2f..%2f..%2fetc%2fpasswd",
        "%2e%2e/%2e%2e/etc/passwd",
        "file:///etc/passwd",
    ):
        for key in ("plain", "boss"):
            responses = [
                target.ask("POST", "/v1/completions", key, json={"model": name, "prompt": "x"}),
                target.ask("GET", f"/v1/models/{name}", key),
                target.ask("POST", f"/caravan/replicas/{name}/flush", key),
                target.ask("GET", f"/caravan/requests/{name}", key),
            ]
            statuses.update(response.status_code for response in responses)
            leaks += [name for response in responses if "root:" in response.text]
        request = f"GET /{name} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {target.keys['boss']}\r\n\r\n".encode()
        answer, _, _ = target.raw(request, wait_s=5)
        statuses[int(answer.split()[1]) if answer else "closed"] += 1
        leaks += [name] if b"root:" in answer else []
    wrong = {status for status in statuses if status == 200 or (isinstance(status, int) and status >= 500)}
    claim("no name reaches the file system", not leaks and not wrong, dict(statuses))


def rotation(target: Target, file: KeyFile) -> None:
    before = target.ask("GET", "/caravan/replicas", "boss").json()["replicas"][0]["info"]["pid"]
    with file.changing() as replace:
        keys, target.keys["new"] = file.read().without("plain").with_key("new")
        replace(keys)
    started = time.monotonic()
    while (new := target.ask("GET", "/v1/models", "new").status_code) != 200 and time.monotonic() < started + 15:
        time.sleep(0.2)
    seconds, old = time.monotonic() - started, target.ask("GET", "/v1/models", "plain").status_code
    claim("keys change while it serves", (new, old) == (200, 401) and seconds < REREAD_S + 3, f"{seconds:.1f} s")
    after = target.ask("GET", "/caravan/replicas", "boss").json()["replicas"][0]["info"]["pid"]
    claim("and no process restarts for it", before == after, f"pid {after}")
    good = file.read_bytes()
    path = Path(httpx.URL(file.uri).path)
    path.write_text('{"keys": [')
    time.sleep(REREAD_S + 1.5)
    broken = target.ask("GET", "/v1/models", "new").status_code
    claim("a broken key file keeps the last good keys", broken == 200, broken)
    path.write_bytes(good)


def talk(target: Target) -> list[str]:
    """Requests that succeed and that fail in many ways; all that must be in no log."""
    secret = "zebra-" + secrets.token_hex(12)
    chat = [{"role": "user", "content": f"{secret} chat"}]
    ways: list[tuple[str, object]] = [
        ("/v1/completions", {"model": MODEL, "prompt": secret, "max_tokens": 40, "temperature": 0}),
        ("/v1/chat/completions", {"model": MODEL, "messages": chat, "max_tokens": 40, "temperature": 0}),
        ("/v1/completions", {"model": MODEL, "prompt": secret * 5000}),
        ("/v1/completions", {"model": MODEL, "prompt": secret * 40}),
        ("/v1/completions", {"model": secret, "prompt": secret}),
        ("/v1/completions", {"model": MODEL, "prompt": {"a": secret}}),
        ("/v1/completions", {"model": MODEL, "prompt": secret, "temperature": secret, secret: 1}),
        ("/v1/chat/completions", {"model": MODEL, "messages": [{"role": secret, "content": secret}]}),
        ("/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": secret, "name": [secret]}]}),
        ("/tokenize", {"model": MODEL, "prompt": secret}),
        ("/v1/completions", f'{{"model": "{MODEL}", "prompt": "{secret}'.encode()),
    ]
    statuses, wanted = Counter(), [secret]
    for path, body in ways:
        given = {"content": body} if isinstance(body, bytes) else {"json": body}
        response = target.ask("POST", path, "plain", **given)
        statuses[response.status_code] += 1
        if response.status_code == 200 and "choices" in response.json():
            choice = response.json()["choices"][0]
            answer = choice.get("text") or choice["message"]["content"]
            wanted += [answer] if len(answer) >= 16 else []
    headers = {"Authorization": f"Bearer {target.keys['plain']}"}
    body = {"model": MODEL, "prompt": secret, "max_tokens": 300, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{target.url}/v1/completions", json=body, headers=headers, trust_env=False) as stream:
        next(stream.iter_bytes())
    claim("talked", statuses[200] == 3 and not statuses[500], dict(statuses))
    return wanted


def logs(session: Path, dashboard: str, private: dict[str, str]) -> None:
    files = [path for path in session.rglob("*") if path.is_file() and not path.is_symlink()]
    found = set()
    total = 0
    for path in files:
        try:
            data = path.read_bytes()
        except OSError:
            continue
        total += len(data)
        found |= {(name, path.name) for name, text in private.items() if text.encode() in data}
    serve = [path.name for path in files if "serve" in str(path.relative_to(session))]
    claim(
        "no key, prompt or answer in any of Ray's files",
        bool(serve) and not found,
        found or f"{len(files)} files ({len(serve)} of Serve), {total >> 10} KiB, {len(private)} texts",
    )
    shown = httpx.get(f"{dashboard}/api/serve/applications/", trust_env=False).text
    claim("nor in what Ray's dashboard shows", not [name for name, text in private.items() if text in shown], "no")


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="serving-security-"))
    canary = folder / "canary"
    model = save_tiny_model(folder / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE.replace("CANARY", str(canary)))
    file, known, keys = KeyFile(folder / "keys.json"), Keys(), {}
    limits = {"plain": {}, "boss": {"operator": True}, "single": {"concurrency": 1}, "slow": {"requests_per_minute": 2}}
    for name, values in (limits | {"removed": {}}).items():
        known, keys[name] = known.with_key(name, **values)
    with file.changing() as replace:
        replace(known.without("removed"))
    args = AppArgs(
        model=str(model),
        served_name=MODEL,
        cpus_per_replica=0.1,
        api_keys=file.uri,
        engine={"num_blocks": 512, "max_batched_tokens": 64, "max_running": 4},
    )
    with local_ray(folder) as dashboard:
        runtime_env = control.shipped_runtime_env()
        endpoint = control.deploy(
            args, replicas=1, dashboard_url=dashboard, runtime_env=runtime_env, port=find_free_port()
        )
        session = Path(ray._private.worker._global_node.get_session_dir_path())
        target = Target(endpoint.url, keys)
        description = target.ask("GET", "/openapi.json", "plain").json()
        strangers(target, description)
        junk(target)
        bodies(target)
        places(target)
        templates(target, canary)
        names(target)
        texts = talk(target)
        rotation(target, file)
        time.sleep(1)
        private = {f"key {name}": key for name, key in target.keys.items()}
        private |= {f"text {number}": json.dumps(text)[1:-1] for number, text in enumerate(texts)}
        private |= {f"plain text {number}": text for number, text in enumerate(texts)}
        logs(session, dashboard, private)
        control.undeploy(dashboard_url=dashboard)
    print(f"{len(_failed)} claims failed" if _failed else "all claims hold")
    sys.exit(1 if _failed else 0)


if __name__ == "__main__":
    main()
