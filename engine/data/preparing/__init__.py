"""`prepare` as a list of steps over a job folder, so that any executor can run them: see `steps.STEPS`."""
