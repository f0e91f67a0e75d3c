"""`python -m tests.deploy.manifests`: writes deploy/kubernetes/segue.yaml, the chart rendered for those without Helm."""

from __future__ import annotations

from tests.deploy.charts import CHART, ROOT, helm

FOLDER = ROOT / "deploy/kubernetes"
MANIFESTS = FOLDER / "segue.yaml"


def rendered() -> str:
    values = FOLDER / "values.yaml"
    return helm("template", "segue", str(CHART), "--namespace", "segue", "--skip-tests", "-f", str(values))


if __name__ == "__main__":
    MANIFESTS.write_text(rendered())
