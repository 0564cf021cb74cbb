"""Small additions to a model that is there already."""
