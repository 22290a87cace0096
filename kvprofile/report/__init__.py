"""Pictures and pages made from profiles and run records; nothing here runs a model or an engine."""
