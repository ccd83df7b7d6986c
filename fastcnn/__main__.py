"""`python -m fastcnn`: the console command `fastcnn`."""

from fastcnn.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
