"""What the commands train; one file each."""
