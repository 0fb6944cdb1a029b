"""Studies that are not figures of the paper: python -m lab.studies.NAME --data-dir DIR"""
