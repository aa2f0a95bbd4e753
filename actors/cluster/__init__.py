"""Ray itself: started or joined, roles placed, actors made, watched, replaced and resized."""
