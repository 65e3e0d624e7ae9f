"""Turn what a run measured into files and pages: metrics, writers, charts, the HTML report."""
