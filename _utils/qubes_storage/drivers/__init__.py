"""The drivers: ``driver = NAME`` in storage.conf is the class ``Pool`` in the file NAME.py here."""
