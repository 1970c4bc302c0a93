"""The paper's claims, tested again on subsets: what a claim is, the statistics, the runs, the tables, the report."""
