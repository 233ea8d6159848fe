"""Fetch NiiVue from the npm registry, check it, and put it where the report finds it.

The file that is committed is the one of this version, to the byte; run the tool again after
changing the version and its checksum (`npm view @niivue/niivue@VERSION dist.integrity`).
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import sys
import tarfile
import urllib.request
from pathlib import Path

VERSION = "0.69.0"
INTEGRITY = (
    "sha512-YMjQvJgD1W2b7DuoxkwlC4VxbrgIePRJ5qyQzXKxi2v2MBVg285P"
    "/CIQyg46oDDGDIcaNlbd+MhtO/edMbXJkA=="
)
ADDRESS = f"https://registry.npmjs.org/@niivue/niivue/-/niivue-{VERSION}.tgz"
# The one build that runs as a plain script, and the smallest.
MEMBER = "package/dist/niivue.umd.js"
ASSETS = Path(__file__).parents[1] / "organfast" / "assets"


def script_of(package: bytes) -> bytes:
    """The script in a package, once its checksum is right."""
    found = "sha512-" + base64.b64encode(hashlib.sha512(package).digest()).decode()
    if found != INTEGRITY:
        sys.exit(f"{ADDRESS}: checksum {found} instead of {INTEGRITY}")
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        member = archive.extractfile(MEMBER)
        if member is None:
            sys.exit(f"{ADDRESS}: holds no {MEMBER}")
        return member.read()


def main() -> None:
    with urllib.request.urlopen(ADDRESS) as answer:
        script = script_of(answer.read())
    for old in ASSETS.glob("niivue-*.js.gz"):
        old.unlink()
    (ASSETS / f"niivue-{VERSION}.umd.js.gz").write_bytes(gzip.compress(script, 9, mtime=0))
    record = {
        "name": "@niivue/niivue",
        "version": VERSION,
        "file": MEMBER,
        "package": ADDRESS,
        "integrity": INTEGRITY,
        "sha256": hashlib.sha256(script).hexdigest(),
        "licence": "BSD-2-Clause, see NIIVUE_LICENSE.txt",
    }
    text = json.dumps(record, indent=1) + "\n"
    (ASSETS / "niivue.json").write_text(text, encoding="utf-8")
    print(f"niivue {VERSION}: {len(script)} bytes")


if __name__ == "__main__":
    main()
