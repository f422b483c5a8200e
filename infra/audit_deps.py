"""Known vulnerabilities of ``infra/constraints.txt``, by pip-audit in an environment of its own (``make audit-deps``).

Exit code 0: none, or no package could be judged from here, which is said; 1: some, which are listed.
"""

import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).resolve().parent / "constraints.txt"
PIP_AUDIT = "pip-audit==2.10.1"


def verdict(report: Mapping[str, Any]) -> tuple[int, str]:
    """Exit code and words for pip-audit's JSON.

    A package that the database does not know is skipped by pip-audit without an error. When it knows none, it was not
    asked: that is no clean result.
    """
    packages = report["dependencies"]
    judged = [one for one in packages if "skip_reason" not in one]
    if not judged:
        return 0, "audit-deps: SKIPPED, the vulnerability database answers for no package from here."
    lines = [
        f"  {one['name']} {one['version']}: {flaw['id']}, fixed in {', '.join(flaw['fix_versions']) or 'no release'}"
        for one in judged
        for flaw in one["vulns"]
    ]
    summary = f"audit-deps: {len(judged)} of {len(packages)} packages judged, {len(lines)} known vulnerabilities"
    return int(bool(lines)), "\n".join([summary, *lines])


def main() -> int:
    """Install pip-audit aside, so that it changes no version that it judges, and run it."""
    with tempfile.TemporaryDirectory(prefix="fedmentor-audit-") as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PIP_AUDIT]
        if subprocess.run(install, capture_output=True, check=False).returncode != 0:
            print(f"audit-deps: SKIPPED, {PIP_AUDIT} cannot be installed from this index.")
            return 0
        audit = [python, "-m", "pip_audit", "--requirement", str(CONSTRAINTS), "--no-deps", "--disable-pip"]
        audit += ["--progress-spinner", "off", "--timeout", "20", "--format", "json"]
        done = subprocess.run(audit, capture_output=True, text=True, check=False)
    try:
        report = json.loads(done.stdout)
    except ValueError:  # it ended before it had judged anything
        report = {"dependencies": []}
    code, words = verdict(report)
    print(words)
    return code


if __name__ == "__main__":
    sys.exit(main())
