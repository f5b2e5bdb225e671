"""Private: what people look at: pictures, pages, and the view of a run that goes on."""
