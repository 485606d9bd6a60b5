"""Tools of all claims: the protocol of a measurement, estimates, the rule of the verdicts, the report."""
