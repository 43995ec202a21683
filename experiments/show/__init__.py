"""What came out: tables, figures, the report."""
