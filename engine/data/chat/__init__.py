"""Chat and preference data: rows of files, their formats, chat templates, and tokens with masks."""
