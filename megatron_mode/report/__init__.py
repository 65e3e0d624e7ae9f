"""Turn what a run measured into files and pages: metrics, writers, evaluation, the HTML report."""
