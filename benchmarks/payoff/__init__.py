"""Does growing pay? What is compared (``contestants.py``), on what text, how one run goes, and the page of the rows."""
