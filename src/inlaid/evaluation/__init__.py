"""Base and tuned model side by side: metrics, report."""
