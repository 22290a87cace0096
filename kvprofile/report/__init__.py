"""Pictures and pages made from profiles and run records; nothing here measures or recomputes."""
