"""Training recipes. Modules here need the extra: pip install 'fastcnn[train]'."""
