"""What every command rests on: files, paths, printing, progress."""
