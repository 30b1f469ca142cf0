"""Base and tuned side by side: held-out loss, video metrics, a report that opens anywhere."""
