"""`python -m convert SOURCE --to gguf --quant q4`."""

from convert.cli import main

if __name__ == "__main__":
    main()
