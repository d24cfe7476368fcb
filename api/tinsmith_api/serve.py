"""`tinsmith serve`: the whole service in one command."""

import fcntl
import logging
import os
import resource
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import uvicorn
from pydantic import SecretStr

from tinsmith_api.app import make_app
from tinsmith_api.journal import identities, metrics
from tinsmith_api.service import Service
from tinsmith_api.settings import Settings

log = logging.getLogger("tinsmith")

# Open at once, connections among them.
_FILES = 1 << 16


def serve(settings: Settings) -> None:
    """Run everything until interrupted, on a data directory that is there. Exits with a sentence if the port
    or that directory is taken, or if a base model cannot be loaded."""
    # Here everything lives in one process tree, whatever the environment says of a fleet.
    settings = settings.model_copy(update={"redis": SecretStr("")})
    guard = _own(settings.folder)
    address = settings.folder / "address"  # for tinsmith.connect(): where the one that holds the lock listens
    address.unlink(missing_ok=True)
    listener = _listen(settings.host, settings.port)
    service = Service(settings, on_failure=lambda: setattr(server, "should_exit", True))
    key = local_key(settings.folder)
    service.journal.write(lambda c: identities.create_key(c, "local", key=key)).result()
    address.write_text(_address(listener))
    _greet(_address(listener), key, settings)
    server = _server(service)
    server.run(sockets=[listener])
    guard.close()
    if service.failure:
        sys.exit(f"tinsmith: {service.failure}")


def serve_api(settings: Settings) -> None:
    """One of a fleet's API processes, until interrupted."""
    listener = _listen(settings.host, settings.port)
    service = Service(settings)
    if key := os.environ.get("TINSMITH_API_KEY"):
        _check_key(key)
        service.journal.write(lambda c: identities.create_key(c, "local", key=key)).result()
    log.info("listening on %s", _address(listener))
    _server(service).run(sockets=[listener])


def _server(service: Service) -> uvicorn.Server:
    _allow_connections()
    metrics.serve(service.settings.metrics_port)
    # A thread that reads a large body gives way to the event loop after so long, not after 5 ms each time.
    sys.setswitchinterval(0.0005)
    # uvicorn handles these two itself and raises them once more at its end, when all is done.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    config = uvicorn.Config(
        make_app(service),
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=5,
        # Longer than clients and proxies keep a connection that nobody uses: who hangs up first may do so
        # while the other sends, and the call has to be sent again.
        timeout_keep_alive=180,
    )
    return uvicorn.Server(config)


def _allow_connections() -> None:
    """Every call that waits for a result holds one, and a shell gives a process 1,024 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < enough:
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{host}:{port}"


def local_key(folder: Path) -> str:
    """TINSMITH_API_KEY, or the key made at the first start and kept beside the data, for its owner only."""
    if given := os.environ.get("TINSMITH_API_KEY"):
        _check_key(given)
        return given
    file = folder / "key"
    if file.exists() and (key := file.read_text().strip()):
        return key
    from secrets import token_urlsafe

    key = identities.KEY_PREFIX + token_urlsafe(32)
    descriptor, written = tempfile.mkstemp(prefix=".key-", dir=folder)  # readable by its owner only
    with open(descriptor, "w") as out:
        out.write(key + "\n")
        out.flush()
        os.fsync(out.fileno())
    os.replace(written, file)
    return key


def _check_key(key: str) -> None:
    if not key.startswith(identities.KEY_PREFIX):
        sys.exit(
            f"tinsmith: TINSMITH_API_KEY must begin with {identities.KEY_PREFIX!r}, or clients refuse it"
        )


def _own(folder: Path) -> Any:
    """One service per data directory. The lock names its process, for tinsmith.connect() to stop."""
    guard = open(folder / "lock", "a")  # noqa: SIM115 - held as long as the process lives
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"tinsmith: another service is using {folder}: stop it, or choose another --data-dir")
    guard.truncate(0)
    guard.write(str(os.getpid()))
    guard.flush()
    return guard


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        sys.exit(f"tinsmith: cannot listen on {host}:{port} ({error.strerror}): choose another --port")
    return listener


def _greet(address: str, key: str, settings: Settings) -> None:
    model = next(iter(settings.models))
    print(
        f"""Tinsmith is starting on {address} with {", ".join(settings.models)}.
Point the official SDK at it:

  export TINKER_BASE_URL={address}
  export TINKER_API_KEY={key}
  python -c 'import tinker; print(tinker.ServiceClient().create_lora_training_client("{model}").get_info())'

Stop with Ctrl-C. Nothing is lost: start it again on {settings.folder} and runs go on.""",
        flush=True,
    )
