"""Pictures of snapshots, diffs and reports: terminal, HTML, SVG.  Nothing is computed here."""
