"""The report of runs: one HTML page that needs no network. `page` puts it together, docs/report.md explains it."""
