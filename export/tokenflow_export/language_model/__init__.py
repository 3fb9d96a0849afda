"""A generator's or an understander's released directory to a bundle: one paged transformer graph serves both."""
