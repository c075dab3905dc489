"""What a run tells while it goes and leaves at its end; nothing here changes it."""
