"""What every script needs and no paper mentions: command line, devices, folders, pixels."""
