"""Backing stores of a tracking server, started on this machine: PostgreSQL for runs, S3 for artifacts."""

import getpass
import importlib.util
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.support.network import free_port, wait_until_up

PASSWORD = "pg-secret-4711"
S3_KEY, S3_SECRET = "AKIA-TEST-0815", "s3-secret-4712"
BUCKET = "runs"


def postgres_programs() -> Path | None:
    """Return the folder with `initdb` and `postgres`, or None if PostgreSQL is not installed."""
    folders = [path.parent for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))]  # Debian
    if on_path := shutil.which("postgres"):
        folders.append(Path(on_path).parent)
    needed = ("initdb", "postgres", "pg_isready", "pg_dump")
    return next((folder for folder in reversed(folders) if all((folder / name).exists() for name in needed)), None)


def why_no_backing_stores() -> str | None:
    """Return what is missing for these stores, or None."""
    if postgres_programs() is None:
        return "PostgreSQL is not installed (Debian: apt-get install postgresql)"
    missing = [name for name in ("psycopg2", "boto3", "moto") if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} missing: pip install '.[deployments]'" if missing else None


class Postgres:
    """A PostgreSQL server in a temporary folder; it refuses to run as root, so root starts it as another user."""

    def __init__(self) -> None:
        programs = postgres_programs()
        assert programs is not None
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        user = "postgres" if os.geteuid() == 0 else getpass.getuser()
        identity = pwd.getpwnam(user)
        password = self.folder / "password"
        password.write_text(PASSWORD)
        for path in (self.folder, password):
            os.chown(path, identity.pw_uid, identity.pw_gid)
        user_of: dict[str, Any] = {}
        if os.geteuid() == 0:
            user_of = {"user": identity.pw_uid, "group": identity.pw_gid}
        data, self.port = self.folder / "data", free_port()
        subprocess.run(
            [programs / "initdb", "-D", data, "-U", "mlflow", "--auth", "scram-sha-256", "--pwfile", password],
            check=True,
            capture_output=True,
            cwd=self.folder,
            **user_of,
        )
        self.process = subprocess.Popen(
            [programs / "postgres", "-D", data, "-p", str(self.port), "-k", self.folder, "-h", "127.0.0.1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
            **user_of,
        )
        ready = [str(programs / "pg_isready"), "-h", "127.0.0.1", "-p", str(self.port), "-t", "60"]
        while subprocess.run(ready, capture_output=True, check=False).returncode:
            assert self.process.poll() is None
        self.address = f"mlflow:{PASSWORD}@127.0.0.1:{self.port}/postgres"
        self.uri = f"postgresql+psycopg2://{self.address}"

    def dump(self) -> str:
        """Return everything in the database as SQL."""
        programs = postgres_programs()
        assert programs is not None
        done = subprocess.run(
            [programs / "pg_dump", f"postgresql://{self.address}"], check=True, capture_output=True, text=True
        )
        return done.stdout

    def close(self) -> None:
        """Stop the server and remove its files."""
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.folder)


class S3:
    """An S3 server (moto's) with an empty bucket."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.endpoint = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
        )
        wait_until_up(self.endpoint, self.process)
        self.client().create_bucket(Bucket=BUCKET)

    @property
    def env(self) -> dict[str, str]:
        """Environment variables that MLflow and boto3 need, in servers and clients alike."""
        return {
            "AWS_ACCESS_KEY_ID": S3_KEY,
            "AWS_SECRET_ACCESS_KEY": S3_SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_S3_ENDPOINT_URL": self.endpoint,
        }

    def client(self) -> Any:
        """Return a boto3 client of this server."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=S3_KEY,
            aws_secret_access_key=S3_SECRET,
            region_name="us-east-1",
        )

    def contents(self) -> dict[str, bytes]:
        """Return every object of the bucket by its key."""
        client = self.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return {key: client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}

    def close(self) -> None:
        """Stop the server."""
        self.process.terminate()
        self.process.wait()
