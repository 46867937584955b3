"""Known vulnerabilities of what is installed, by pip-audit; says so where no service that knows them can be reached.

python -m tests.faults.audit
"""

import json
import subprocess
import sys


def main() -> None:
    """Ends with 1 when something vulnerable is installed, and with 0 when nothing could be asked."""
    command = [sys.executable, "-m", "pip_audit", "--local", "--progress-spinner", "off", "--format", "json"]
    ended = subprocess.run(command, capture_output=True, text=True)
    try:
        packages = json.loads(ended.stdout)["dependencies"]
    except (ValueError, KeyError):
        reason = (ended.stderr.strip().splitlines() or ["no answer"])[-1]
        print(f"not audited: {reason}")
        return
    audited = [package for package in packages if "skip_reason" not in package]
    if not audited:
        print(f"not audited: no service that knows vulnerabilities can be reached ({len(packages)} packages installed)")
        return
    found = [(package, known) for package in audited for known in package["vulns"]]
    for package, known in found:
        mend = ", ".join(known["fix_versions"]) or "none yet"
        print(f"{package['name']} {package['version']}: {known['id']}; fixed in {mend}")
    print(f"{len(audited)} of {len(packages)} packages audited, {len(found)} known vulnerabilities")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
