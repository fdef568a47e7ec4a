"""The commands of `python -m fasttrain`: one file each, its options and what it does with them."""
