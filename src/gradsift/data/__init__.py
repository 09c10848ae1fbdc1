"""From rows in any common format to token ids and labels: loading, chat templates, duplicates and overlap."""
