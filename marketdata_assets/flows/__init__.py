"""What was asked: one function per thing a person asks for. The only place where tools meet."""
