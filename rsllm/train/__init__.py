"""One train loop for the recommender and both language-model stages, under Ray Train."""
